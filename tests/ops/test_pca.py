"""The projection against numpy's singular value decomposition of all samples at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from samdistill.ops.pca import Projection
from samdistill.types import UserError


def samples(d: int = 8, sizes: tuple[int, ...] = (50, 1, 0, 30), offset: float = 5.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=generator)
    return [torch.randn(size, d, generator=generator) @ mix + offset for size in sizes]


def decomposed(parts: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, directions in rows, standard deviations along them."""
    data = torch.cat(parts).double().numpy()
    _, stretch, directions = np.linalg.svd(data - data.mean(0), full_matrices=False)
    return data.mean(0), directions, stretch / np.sqrt(len(data))


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_directions_are_those_of_numpys_svd(channels: int) -> None:
    parts = samples()
    mean, directions, deviations = decomposed(parts)
    found = Projection.fit(parts, channels, standardise=False)
    assert found.channels == channels and found.scale == 1
    assert found.mean.dtype == found.basis.dtype == torch.float32
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=1e-5)
    signs = np.sign((found.basis.numpy() * directions[:channels]).sum(1, keepdims=True))
    np.testing.assert_allclose(found.basis.numpy(), signs * directions[:channels], atol=1e-5)
    out = found.apply(torch.cat(parts).T[None, :, :, None])[0, :, :, 0]
    np.testing.assert_allclose(out.std(1, correction=0).numpy(), deviations[:channels], rtol=1e-4)
    np.testing.assert_allclose(out.mean(1).numpy(), 0, atol=1e-5)


def test_how_samples_are_cut_and_their_offset_change_nothing() -> None:
    parts = samples()
    whole = Projection.fit([torch.cat(parts)], 4, standardise=True)
    for cut in (parts, list(torch.cat(parts).split(7)), (part for part in parts)):
        found = Projection.fit(cut, 4, standardise=True)
        torch.testing.assert_close(found.mean, whole.mean)
        torch.testing.assert_close(found.basis, whole.basis, atol=1e-5, rtol=1e-5)
        assert found.scale == pytest.approx(whole.scale)
    far = Projection.fit([part.double() + 1e4 for part in parts], 4, standardise=True)
    torch.testing.assert_close(far.basis, whole.basis, atol=1e-5, rtol=1e-5)


def test_signs_do_not_depend_on_the_samples_signs() -> None:
    parts = samples(offset=0.0)
    first, second = (Projection.fit([sign * part for part in parts], 5, standardise=False) for sign in (1, -1))
    torch.testing.assert_close(first.basis, second.basis)
    assert (first.basis.gather(1, first.basis.abs().argmax(1, keepdim=True)) > 0).all()


def test_standardised_features_have_a_standard_deviation_of_one_overall() -> None:
    parts = samples()
    grid = torch.cat(parts)[:80].T.reshape(1, 8, 8, 10)
    plain = Projection.fit(parts, 3, standardise=False)
    found = Projection.fit(parts, 3, standardise=True)
    out = found.apply(torch.cat(parts).T[None, :, :, None])
    assert out.square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(found.apply(grid), plain.apply(grid) * found.scale)  # one factor: proportions stay


def test_applied_to_a_grid_it_is_the_formula_at_every_cell() -> None:
    found = Projection.fit(samples(), 3, standardise=True)
    grid = torch.randn(2, 8, 4, 5)
    out = found.apply(grid)
    assert out.shape == (2, 3, 4, 5)
    cell = found.scale * found.basis @ (grid[1, :, 2, 3] - found.mean)
    torch.testing.assert_close(out[1, :, 2, 3], cell)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(found.apply(grid), out)


def test_fewer_channels_than_asked_are_only_turned() -> None:
    found = Projection.fit(samples(d=4), 16, standardise=False)
    assert found.channels == 4
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(4), atol=1e-5, rtol=0)
    a, b = torch.randn(2, 1, 4, 3, 3).unbind()
    torch.testing.assert_close((found.apply(a) - found.apply(b)).norm(dim=1), (a - b).norm(dim=1))


def test_fewer_samples_than_channels_still_give_a_basis() -> None:
    found = Projection.fit([torch.eye(8)[:3]], 6, standardise=True)
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(6), atol=1e-5, rtol=0)
    assert np.isfinite(found.scale)


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ([], "no features"),
        ([torch.zeros(0, 4)], "no features"),
        ([torch.full((9, 4), 3.0)], "all features are equal"),
        ([torch.zeros(9, 4)], "all features are equal"),
        ([torch.randn(9, 4), torch.full((1, 4), torch.inf)], "not finite"),
    ],
)
def test_what_cannot_be_fitted_is_said(parts: list[torch.Tensor], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Projection.fit(parts, 2, standardise=True)


def test_a_saved_projection_is_read_back_exactly_and_only_for_its_teacher(tmp_path) -> None:
    found, path = Projection.fit(samples(), 3, standardise=True), tmp_path / "deep" / "sam.safetensors"
    found.save(path, "abc")
    again = Projection.load(path, "abc")
    assert torch.equal(again.mean, found.mean) and torch.equal(again.basis, found.basis)
    assert again.scale == found.scale
    assert [file.name for file in path.parent.iterdir()] == ["sam.safetensors"]
    with pytest.raises(UserError, match="another teacher"):
        Projection.load(path, "abd")


def test_files_that_are_no_projection_are_refused(tmp_path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(UserError, match="no such file"):
        Projection.load(path, "abc")
    path.write_bytes(b"12345678 not a header")
    with pytest.raises(UserError, match="damaged"):
        Projection.load(path, "abc")
    save_file({"mean": torch.zeros(3)}, path, {"fingerprint": "abc", "scale": "1.0"})
    with pytest.raises(UserError, match="not a projection"):
        Projection.load(path, "abc")
