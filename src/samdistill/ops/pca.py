"""Bringing features to fewer channels by principal components, fitted once and then frozen.

A projection that learns together with a student can collapse to what is easy to match; this one cannot.
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
    """``scale * basis (x - mean)`` for each vector of d channels; the rows of ``basis`` are orthonormal.

    scale: one number for all channels, so that the directions keep their proportions.
    """

    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "c d"]
    scale: float = 1.0

    @property
    def channels(self) -> int:
        """c, what comes out."""
        return self.basis.shape[0]

    def apply(self, x: Float[Tensor, "b d gh gw"]) -> Float[Tensor, "b c gh gw"]:
        """In float32, under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            centred = x.float() - self.mean[:, None, None]
            return torch.einsum("cd,bdhw->bchw", self.basis * self.scale, centred)

    def to(self, device: torch.device | str) -> Projection:
        return replace(self, mean=self.mean.to(device), basis=self.basis.to(device))

    @classmethod
    def fit(cls, samples: Iterable[Float[Tensor, "k d"]], channels: int, standardise: bool) -> Projection:
        """The ``channels`` directions of greatest variance in all samples together, or all d where d is less.

        Samples are read once, and only mean and covariance are kept, in float64 on the CPU: neither their number nor
        the device decides the result beyond rounding. The largest entry of each direction is positive. standardise: the
        standard deviation over everything that ``apply`` gives for the samples is 1 (one scale for all channels, as in
        PHI-S, Ranzinger et al., 2024), so that features of several teachers count alike. Raises ``UserError`` where
        there are no samples, or none that differ, and for values that are not finite.
        """
        count, mean, scatter = _moments(samples)
        variances, vectors = torch.linalg.eigh(scatter / count)  # ascending
        kept = min(channels, len(mean))
        basis = vectors.flip(1)[:, :kept].T
        variance = variances.flip(0)[:kept].mean().item()
        if not variance > 1e-12 * mean.square().mean().item():
            raise UserError("the features to fit a projection on are the same everywhere: give it other images")
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        basis = basis * largest.sign()
        return cls(mean.float(), basis.float().contiguous(), variance**-0.5 if standardise else 1.0)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write a safetensors file, whole or not at all. fingerprint: of what it was fitted on; ``load`` checks it."""
        make_folder(path.parent)
        tensors = {"mean": self.mean.cpu(), "basis": self.basis.cpu()}
        with replacing(path) as new:
            save_file(tensors, new, {"fingerprint": fingerprint, "scale": repr(self.scale)})

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Projection:
        """Raises ``UserError`` for a file that is missing, damaged, or was fitted on something else."""
        if not path.is_file():
            raise UserError(f"{path}: no such file; it is written when the teacher's projection is fitted")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                mean, basis, scale = file.get_tensor("mean"), file.get_tensor("basis"), float(about["scale"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path}: is no projection of a teacher's features, or damaged: {error}") from None
        if about.get("fingerprint") != fingerprint:
            raise UserError(
                f"{path}: was fitted on another teacher or other images; delete it, or choose another folder"
            )
        return cls(mean, basis, scale)


def _moments(samples: Iterable[Float[Tensor, "k d"]]) -> tuple[int, Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Number, mean and sum of squared deviations, joined batch by batch (Chan et al., 1983, eq. 2.1)."""
    count, mean, scatter = 0, torch.zeros(0), torch.zeros(0)
    for given in samples:
        batch = given.detach().cpu().double()
        if not bool(torch.isfinite(batch).all()):
            raise UserError("the features to fit a projection on are not finite: give the teacher precision fp32")
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
        raise UserError("there are no features to fit a projection on: the sample of images is empty")
    return count, mean, scatter
