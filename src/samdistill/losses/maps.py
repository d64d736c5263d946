"""What terms between maps share, in float32: squared errors per element, and unit vectors over channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .pairs import mean


def fpn_term(
    student: Sequence[Float[Tensor, "b c _ _"]], teacher: Sequence[Float[Tensor, "b c _ _"]]
) -> Float[Tensor, ""]:
    """Squared error per element of every level, averaged over the levels: the one term that needs no question."""
    return torch.stack([grid_error(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]).mean()


def grid_error(student: Float[Tensor, "n c h w"], teacher: Float[Tensor, "n c th tw"]) -> Float[Tensor, ""]:
    """``squared_error`` of two maps, the student's resized to the teacher's, which gets no gradient."""
    return squared_error(resized(student.float(), teacher), teacher.detach().float())


def squared_error(student: Float[Tensor, "n ..."], target: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Mean over the elements of each item, then over the items. ``ValueError`` for different shapes."""
    if student.shape != target.shape:  # broadcasting would hide a wrong layout
        raise ValueError(f"the student's {tuple(student.shape)} and the teacher's {tuple(target.shape)} do not match")
    return mean((student - target).square().flatten(1).mean(1))


def resized(maps: Float[Tensor, "n c h w"], like: Float[Tensor, "*n th tw"]) -> Float[Tensor, "n c th tw"]:
    """Bilinear, to the size of ``like``."""
    size = like.shape[-2:]
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def directions(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Unit vectors over channels; zeros, cut off from the gradient, where there is no direction."""
    squares = (x**2).sum(1, keepdim=True)
    some = squares > 1e-12
    return torch.where(some, x / torch.where(some, squares, 1.0).sqrt(), 0.0)
