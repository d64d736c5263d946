"""Reduce the channels of features with principal components, which are fitted once and then fixed.

A projection that is trained together with a student can collapse to directions that are easy to match. A fixed one
cannot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..io import make_folder, replacing
from ..types import UserError


@dataclass(frozen=True)
class Projection:
    """Linear projection ``scale * basis (x - mean)`` of vectors with d channels to c channels.

    Attributes:
        mean: Mean of the input, of shape (d,).
        basis: Orthonormal rows, of shape (c, d).
        scale: One factor for all channels, which keeps their relative variances.
    """

    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "c d"]
    scale: float = 1.0

    @property
    def channels(self) -> int:
        """Number of output channels c."""
        return self.basis.shape[0]

    def apply(self, x: Float[Tensor, "b d gh gw"]) -> Float[Tensor, "b c gh gw"]:
        """Project feature maps, in float32 also under autocast.

        Args:
            x: Feature maps of shape (b, d, gh, gw).

        Returns:
            float32 feature maps of shape (b, c, gh, gw).
        """
        with torch.autocast(x.device.type, enabled=False):
            centred = x.float() - self.mean[:, None, None]
            return torch.einsum("cd,bdhw->bchw", self.basis * self.scale, centred)

    def to(self, device: torch.device | str) -> Projection:
        """Return a copy with the tensors on ``device``."""
        return replace(self, mean=self.mean.to(device), basis=self.basis.to(device))

    @classmethod
    def fit(cls, samples: Iterable[Float[Tensor, "k d"]], channels: int, standardise: bool) -> Projection:
        """Fit the directions of greatest variance over all samples.

        The samples are read once. Only mean and covariance are kept, in float64 on the CPU, so batch sizes and device
        change the result by rounding only. The largest entry of each direction is positive.

        Args:
            samples: Batches of k vectors, of shape (k, d). k may differ and may be 0.
            channels: Number of directions. If d is smaller, there are d.
            standardise: Choose ``scale`` so that the standard deviation over all channels of the projected samples is
                1, and features of several teachers have equal weight. The scale is one number for all channels, as in
                PHI-S.

        Returns:
            The projection, on the CPU.

        Raises:
            UserError: There are no samples, all samples are equal, or a value is not finite.

        Source:
            Ranzinger et al., PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation, 2024.
        """
        count, mean, scatter = _moments(samples)
        variances, basis = principal_axes(scatter / count, channels)
        variance = variances[: len(basis)].mean().item()
        if not variance > 1e-12 * mean.square().mean().item():
            raise UserError("cannot fit a projection: all features are equal; give other images")
        return cls(mean.float(), basis.float().contiguous(), variance**-0.5 if standardise else 1.0)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write a safetensors file atomically.

        Args:
            path: The file. Its folder is created.
            fingerprint: Fingerprint of the data that the projection was fitted on. ``load`` compares it.
        """
        make_folder(path.parent)
        tensors = {"mean": self.mean.cpu(), "basis": self.basis.cpu()}
        with replacing(path) as new:
            save_file(tensors, new, {"fingerprint": fingerprint, "scale": repr(self.scale)})

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Projection:
        """Read a projection that ``save`` wrote.

        Args:
            path: The file.
            fingerprint: Expected fingerprint.

        Raises:
            UserError: The file is missing or damaged, or its fingerprint differs.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such file; it is written when the teacher's projection is fitted")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                mean, basis, scale = file.get_tensor("mean"), file.get_tensor("basis"), float(about["scale"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path}: not a projection of a teacher's features, or damaged: {error}") from None
        if about.get("fingerprint") != fingerprint:
            raise UserError(
                f"{path}: was fitted on another teacher or other images; delete it, or choose another folder"
            )
        return cls(mean, basis, scale)


def principal_axes(covariance: Float[Tensor, "d d"], count: int) -> tuple[Float[Tensor, " d"], Float[Tensor, "k d"]]:
    """Compute the principal axes of a covariance matrix.

    The largest entry of each axis is positive, so the covariance determines the signs.

    Args:
        covariance: Symmetric matrix of shape (d, d).
        count: Number of axes. If d is smaller, there are d.

    Returns:
        All d variances in descending order, and the axes of the largest ones, of shape (count, d).
    """
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    basis = vectors.flip(1)[:, :count].T
    return variances.flip(0), basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()


def _moments(samples: Iterable[Float[Tensor, "k d"]]) -> tuple[int, Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Compute the number, the mean and the sum of squared deviations of all samples, batch by batch.

    Source:
        Chan et al., 1983, eq. 2.1.
    """
    count, mean, scatter = 0, torch.zeros(0), torch.zeros(0)
    for given in samples:
        batch = given.detach().cpu().double()
        if not bool(torch.isfinite(batch).all()):
            raise UserError(
                "cannot fit a projection: the teacher's features are not finite; give it the precision fp32"
            )
        size = len(batch)
        if size == 0:
            continue
        own_mean = batch.mean(0)
        centred = batch - own_mean
        own = centred.T @ centred
        if count == 0:
            count, mean, scatter = size, own_mean, own
            continue
        shift, total = own_mean - mean, count + size
        scatter += own + torch.outer(shift, shift) * (count * size / total)
        mean += shift * (size / total)
        count = total
    if count == 0:
        raise UserError("cannot fit a projection: there are no features, because the sample of images is empty")
    return count, mean, scatter
