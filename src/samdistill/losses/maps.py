"""Helpers of loss terms between feature maps, in float32."""

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
    """Return the squared error per element of each FPN level, averaged over the levels.

    This is the only detection term that does not depend on a question.
    """
    return torch.stack([grid_error(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]).mean()


def grid_error(student: Float[Tensor, "n c h w"], teacher: Float[Tensor, "n c th tw"]) -> Float[Tensor, ""]:
    """Return ``squared_error`` of two maps. The student's is resized to the teacher's, which gets no gradient."""
    return squared_error(resized(student.float(), teacher), teacher.detach().float())


def squared_error(student: Float[Tensor, "n ..."], target: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Return the squared error, averaged over the elements of each item, then over the items.

    Raises:
        ValueError: The shapes differ.
    """
    if student.shape != target.shape:  # broadcasting would hide a wrong layout
        raise ValueError(f"the student's {tuple(student.shape)} and the teacher's {tuple(target.shape)} do not match")
    return mean((student - target).square().flatten(1).mean(1))


def resized(maps: Float[Tensor, "n c h w"], like: Float[Tensor, "*n th tw"]) -> Float[Tensor, "n c th tw"]:
    """Resize maps to the height and width of ``like``, bilinearly."""
    size = like.shape[-2:]
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def directions(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Divide by the norm over channels. If its square is at most 1e-12, the vector becomes zeros without gradient."""
    squares = (x**2).sum(1, keepdim=True)
    some = squares > 1e-12
    return torch.where(some, x / torch.where(some, squares, 1.0).sqrt(), 0.0)
