"""Codecs against hand-packed bytes, NumPy's SVD, and their documented error bounds."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from samdistill.store import CODECS, FeatureError, make_codec, record_bytes
from samdistill.types import UserError

SAM3 = (1024, 72, 72)


def test_every_registered_codec_is_in_these_tests(tiny):
    assert set(CODECS.names()) == {"fp16", "fp32", "int8", "pca{K}-int8"}


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        ("fp16", 10_616_836),
        ("fp32", 4 + 4 * 1024 * 72 * 72),
        ("int8", 4 + 1024 * (8 + 5184)),
        ("pca256-int8", 4 + 256 * (8 + 5184)),
    ],
)
def test_bytes_per_image_at_full_size(codec, size):
    assert record_bytes(codec, SAM3) == size


def test_pca256_takes_an_eighth_of_the_published_record():
    assert 7.98 < record_bytes("fp16", SAM3) / record_bytes("pca256-int8", SAM3) <= 8


def test_fp16_payload_is_the_published_one():
    payload = make_codec("fp16", (2, 1, 2)).encode(torch.tensor([[[1.0, -2.5]], [[0.1, 65504.0]]]))
    assert payload == struct.pack("<4e", 1.0, -2.5, 0.1, 65504.0)


def test_int8_payload_by_hand():
    # Channel 0: range -1..1.54, step 2.54 / 254 = 0.01, middle 0.27. Channel 1 is constant.
    payload = make_codec("int8", (2, 1, 3)).encode(torch.tensor([[[-1.0, 1.54, 0.27]], [[3.0, 3.0, 3.0]]]))
    steps, middles = np.frombuffer(payload[:8], "<f4"), np.frombuffer(payload[8:16], "<f4")
    np.testing.assert_allclose(steps, [0.01, 0], atol=1e-8)
    np.testing.assert_allclose(middles, [0.27, 3], atol=1e-7)
    assert struct.unpack("<6b", payload[16:]) == (-127, 127, 0, 0, 0, 0)


def test_payload_size_and_decoding_alone_and_in_a_batch(tiny, codec_name):
    codec = tiny.codec(codec_name)
    payloads = [codec.encode(tiny.features(key)) for key in "abc"]
    assert {len(payload) for payload in payloads} == {codec.payload_bytes}
    assert codec.record_bytes == codec.payload_bytes + 4 == record_bytes(codec_name, tiny.shape)
    batch = codec.decode_batch(torch.tensor([list(payload) for payload in payloads], dtype=torch.uint8))
    assert batch.dtype == torch.float32 and batch.shape == (3, *tiny.shape)
    for payload, decoded in zip(payloads, batch, strict=True):
        for buffer in (payload, memoryview(payload), np.frombuffer(payload, np.uint8)):
            torch.testing.assert_close(codec.decode(buffer), decoded)


@pytest.mark.parametrize("seed", range(20))
def test_int8_error_is_at_most_half_a_step(seed):
    generator = np.random.default_rng(seed)
    shape = tuple(generator.integers(1, 9, size=3))
    scale, offset = 10.0 ** generator.uniform(-6, 6, (shape[0], 1, 1)), generator.normal(0, 100, (shape[0], 1, 1))
    features = torch.from_numpy((generator.standard_t(2, shape) * scale + offset).astype(np.float32))
    codec = make_codec("int8", shape)
    error = (codec.decode(codec.encode(features)) - features).abs().flatten(1).amax(1)
    rows = features.flatten(1)
    half_step = (rows.amax(1) - rows.amin(1)) / 508
    assert (error <= half_step * 1.001 + rows.abs().amax(1) * 2e-7).all()
    # Never coarser than symmetric scaling by the largest magnitude.
    assert (error <= rows.abs().amax(1) / 127 / 2 * 1.001 + rows.abs().amax(1) * 2e-7).all()


@pytest.mark.parametrize("value", [0.0, -7.25, 1e-44])
def test_constant_channels_come_back_exactly(value):
    features = torch.full((2, 3, 3), value)
    codec = make_codec("int8", (2, 3, 3))
    assert torch.equal(codec.decode(codec.encode(features)), features)


def test_fp16_roundtrip_is_the_cast(tiny):
    codec, features = make_codec("fp16", tiny.shape), tiny.features("x")
    assert torch.equal(codec.decode(codec.encode(features)), features.half().float())


def test_fp32_is_exact_and_reads_slices_of_any_offset(tiny):
    features = torch.tensor([[[1.0, -2.5]], [[1e-42, 3.4e38]]])
    codec = make_codec("fp32", (2, 1, 2))
    payload = codec.encode(features)
    assert payload == struct.pack("<4f", *features.flatten().tolist())
    records = torch.tensor([list(b"seed?" + payload)] * 2, dtype=torch.uint8)  # 5 bytes in front: not aligned
    assert torch.equal(codec.decode_batch(records[:, 5:]), features.expand(2, 2, 1, 2))
    assert torch.equal(codec.decode_batch(records[1:, 5:]), features[None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_dtype_is_taken(tiny, codec_name, dtype):
    codec, features = tiny.codec(codec_name), tiny.features("x").to(dtype)
    assert codec.encode(features.requires_grad_()) == codec.encode(features.detach().float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_features_are_refused(tiny, codec_name, bad):
    features = tiny.features("x")
    features[1, 2, 3] = bad
    with pytest.raises(FeatureError, match=r"NaN or infinity|NaN, infinity"):
        tiny.codec(codec_name).encode(features)


def test_fp16_overflow_is_refused_and_int8_holds_it(tiny):
    features = tiny.features("x")
    features[0, 0, 0] = -70000
    with pytest.raises(FeatureError, match=r"reach 70000, beyond the 65504 of float16; use the codec int8"):
        make_codec("fp16", tiny.shape).encode(features)
    codec = make_codec("int8", tiny.shape)
    assert codec.decode(codec.encode(features))[0, 0, 0] == pytest.approx(-70000, rel=1e-6)


def test_a_map_of_another_shape_is_refused(tiny, codec_name):
    with pytest.raises(FeatureError, match="5x4x3, the store holds 5x3x4"):
        tiny.codec(codec_name).encode(torch.zeros(5, 4, 3))


@pytest.mark.parametrize("name", ["fp17", "pca0-int8", "pca-int8", "pca08-int8", "int8 ", ""])
def test_unknown_codecs(name):
    with pytest.raises(UserError, match="no codec is called"):
        make_codec(name, (4, 2, 2))


def test_more_components_than_channels():
    with pytest.raises(UserError, match=r"pca5-int8.*K from 1 to 4"):
        make_codec("pca5-int8", (4, 2, 2))


def _correlated(count: int, shape: tuple[int, int, int], seed: int = 0) -> list[torch.Tensor]:
    generator = np.random.default_rng(seed)
    channels, height, width = shape
    mixing = generator.normal(size=(channels, channels)) * 0.5 ** np.arange(channels)
    offset = generator.normal(0, 50, size=(channels, 1))
    cells = [mixing @ generator.normal(size=(channels, height * width)) + offset for _ in range(count)]
    return [torch.from_numpy(x.reshape(shape).astype(np.float32)) for x in cells]


def test_pca_basis_against_svd():
    shape, kept = (8, 5, 6), 3
    samples = _correlated(6, shape)
    codec = make_codec(f"pca{kept}-int8", shape)
    codec.fit(iter(samples))
    cells = np.concatenate([s.numpy().reshape(8, -1) for s in samples], 1).astype(np.float64)
    mean = cells.mean(1)
    vectors, singular, _ = np.linalg.svd(cells - mean[:, None], full_matrices=False)
    state = codec.state()
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(np.abs(state["components"].numpy() @ vectors[:, :kept]), np.eye(kept), atol=1e-6)
    np.testing.assert_allclose(state["explained"], singular[:kept] ** 2 / (singular**2).sum(), rtol=1e-5)
    peaks = np.take_along_axis(
        state["components"].numpy(), np.abs(state["components"].numpy()).argmax(1)[:, None], axis=1
    )
    assert (peaks > 0).all()


def test_pca_reconstruction_is_the_projection_up_to_half_steps():
    shape, kept = (8, 5, 6), 3
    samples = _correlated(6, shape)
    codec = make_codec(f"pca{kept}-int8", shape)
    codec.fit(samples)
    basis, mean = codec.state()["components"].double(), codec.state()["mean"].double()[:, None]
    rows = _correlated(1, shape, seed=9)[0].double().flatten(1)
    coefficients = basis @ (rows - mean)
    projected = basis.T @ coefficients + mean
    decoded = codec.decode(codec.encode(rows.reshape(shape))).double().flatten(1)
    half_steps = (coefficients.amax(1) - coefficients.amin(1)) / 508
    assert (decoded - projected).norm(dim=0).max() <= half_steps.norm() * 1.001 + 1e-4


def test_a_full_basis_keeps_everything():
    shape = (6, 4, 4)
    samples = _correlated(3, shape)
    codec = make_codec("pca6-int8", shape)
    codec.fit(samples)
    assert codec.state()["explained"].sum() == pytest.approx(1, abs=1e-6)
    error = (codec.decode(codec.encode(samples[0])) - samples[0]).abs().max()
    assert error < 0.02 * (samples[0] - samples[0].mean((1, 2), keepdim=True)).abs().max()


def test_the_basis_does_not_depend_on_how_samples_are_cut():
    shape = (6, 4, 4)
    samples = _correlated(4, shape)
    whole = make_codec("pca2-int8", (6, 16, 4))
    whole.fit([torch.cat(samples, 1)])
    pieces = make_codec("pca2-int8", shape)
    pieces.fit(samples)
    for name, tensor in whole.state().items():
        torch.testing.assert_close(pieces.state()[name], tensor, rtol=1e-5, atol=1e-6)
    again = make_codec("pca2-int8", shape)
    again.fit(samples)
    assert again.digest == pieces.digest != None  # noqa: E711 - all three in one line


def test_unfitted_and_samples_that_cannot_be_fitted():
    codec = make_codec("pca2-int8", (4, 2, 2))
    assert not codec.fitted and codec.digest is None
    with pytest.raises(UserError, match="no sample"):
        codec.fit([])
    with pytest.raises(UserError, match="NaN"):
        codec.fit([torch.full((4, 2, 2), float("nan"))])
    with pytest.raises(ValueError, match="fitted first"):
        codec.encode(torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match="tensors"):
        codec.load_state({"mean": torch.zeros(4)})
