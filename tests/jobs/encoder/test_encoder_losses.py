"""The brute-force loops below are the published definition, written out; they share nothing with the code."""

from __future__ import annotations

import math

import pytest
import torch

from samdistill.jobs.encoder.losses import FEATURE_LOSSES, masked_cosine, masked_mse


def batch(seed: int = 0, b: int = 3, c: int = 5, h: int = 4, w: int = 6):
    g = torch.Generator().manual_seed(seed)
    predicted, target = (torch.randn(b, c, h, w, generator=g, dtype=torch.float32) for _ in range(2))
    valid = torch.zeros(3, h, w, dtype=torch.bool)
    valid[0, :4, :6] = True
    valid[1, :2, :5] = True
    valid[2, :1, :1] = True
    return predicted, target, valid[:b]


def brute(name: str, predicted: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> float:
    images = []
    for p, t, v in zip(predicted.double(), target.double(), valid, strict=True):
        total, cells = 0.0, 0
        for y in range(v.shape[0]):
            for x in range(v.shape[1]):
                if not v[y, x]:
                    continue
                cells += 1
                a, b = p[:, y, x].tolist(), t[:, y, x].tolist()
                if name == "mse":
                    total += sum((i - j) ** 2 for i, j in zip(a, b, strict=True))
                else:
                    dot = sum(i * j for i, j in zip(a, b, strict=True))
                    total += 1 - dot / math.sqrt(sum(i * i for i in a) * sum(j * j for j in b))
        images.append(total / cells)
    return sum(images) / len(images)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_equals_the_definition_written_as_loops(name: str) -> None:
    for seed in range(3):
        predicted, target, valid = batch(seed)
        value = FEATURE_LOSSES.get(name)(predicted, target, valid)
        assert value.shape == () and value.dtype == torch.float32
        assert value.item() == pytest.approx(brute(name, predicted, target, valid), rel=1e-5)


def test_values_by_hand() -> None:
    predicted = torch.tensor([[[[1.0, 9.0]], [[2.0, 9.0]]]])  # one image, two channels, cells (1, 2) and (9, 9)
    target = torch.tensor([[[[2.0, 0.0]], [[-1.0, 0.0]]]])
    first = torch.tensor([[[True, False]]])
    assert masked_mse(predicted, target, first).item() == pytest.approx(1 + 9)
    assert masked_cosine(predicted, target, first).item() == pytest.approx(1.0)  # (1, 2) and (2, -1) are orthogonal
    assert masked_cosine(predicted, -3 * predicted, first).item() == pytest.approx(2.0)
    assert masked_cosine(predicted, 3 * predicted, first).item() == pytest.approx(0.0, abs=1e-6)


def test_mse_is_channels_times_the_per_element_mean() -> None:
    predicted, target, _ = batch(c=7)
    valid = torch.ones(3, 4, 6, dtype=torch.bool)
    wanted = 7 * torch.nn.functional.mse_loss(predicted, target)
    torch.testing.assert_close(masked_mse(predicted, target, valid), wanted)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_padding_never_matters(name: str) -> None:
    loss = FEATURE_LOSSES.get(name)
    predicted, target, valid = batch()
    value = loss(predicted, target, valid)
    for junk in (1e30, math.inf, math.nan):
        spoiled = [torch.where(valid[:, None], x, junk).requires_grad_() for x in (predicted, target)]
        again = loss(*spoiled, valid)
        assert torch.equal(again, value)
        again.backward()
        for tensor in spoiled:
            assert tensor.grad.isfinite().all()
            assert not tensor.grad.masked_select(~valid[:, None]).any()


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_every_valid_number_gets_its_gradient(name: str) -> None:
    loss = FEATURE_LOSSES.get(name)
    predicted, target, valid = batch()
    predicted.requires_grad_()
    loss(predicted, target, valid).backward()
    assert (predicted.grad.abs().sum(1) > 0).equal(valid)
    step = 1e-3
    for at in ((0, 1, 3, 5), (1, 4, 0, 2), (2, 0, 0, 0)):
        ends = [predicted.detach().clone() for _ in range(2)]
        ends[0][at] += step
        ends[1][at] -= step
        slope = (brute(name, ends[0], target, valid) - brute(name, ends[1], target, valid)) / (2 * step)
        assert predicted.grad[at].item() == pytest.approx(slope, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_an_image_of_padding_alone_contributes_zero(name: str) -> None:
    loss = FEATURE_LOSSES.get(name)
    predicted, target, valid = batch(b=2)
    alone = loss(predicted[:1], target[:1], valid[:1])
    valid[1] = False
    predicted.requires_grad_()
    both = loss(predicted, target, valid)
    assert both.item() == pytest.approx(alone.item() / 2)
    both.backward()
    assert predicted.grad.isfinite().all() and not predicted.grad[1].any()
    assert loss(predicted, target, torch.zeros_like(valid)).item() == 0


def test_zero_vectors_are_safe() -> None:
    for zero_side in (0, 1):
        pair = [torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)]
        pair[zero_side][:, :, 0, 0] = 0
        predicted = pair[0].requires_grad_()
        value = masked_cosine(predicted, pair[1], torch.ones(1, 2, 2, dtype=torch.bool))
        value.backward()
        assert value.isfinite() and predicted.grad.abs().max() < 10  # not 1 / epsilon
        single = torch.zeros(1, 2, 2, dtype=torch.bool)
        single[0, 0, 0] = True
        assert masked_cosine(pair[0], pair[1], single).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_half_precision_gives_the_loss_and_gradient_of_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    """Squares of 400 overflow float16; the sum over a thousand channels loses bits in bfloat16."""
    loss = FEATURE_LOSSES.get(name)
    g = torch.Generator().manual_seed(0)
    predicted, target = (400 * torch.randn(1, 1024, 3, 3, generator=g).to(dtype) for _ in range(2))
    valid = torch.ones(1, 3, 3, dtype=torch.bool)
    half, full = predicted.clone().requires_grad_(), predicted.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(half, target, valid)
    wanted = loss(full, target.float(), valid)
    assert value.dtype == torch.float32 and torch.equal(value, wanted)
    wanted.backward()
    value.backward()
    torch.testing.assert_close(half.grad, full.grad.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_grids_that_do_not_match_are_not_broadcast(name: str) -> None:
    loss = FEATURE_LOSSES.get(name)
    predicted, target, valid = batch()
    for wrong in ((predicted[:1], target, valid), (predicted, target, valid[:1]), (predicted, target[..., :1], valid)):
        with pytest.raises(ValueError, match="do not match"):
            loss(*wrong)
