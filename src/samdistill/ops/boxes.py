"""IoU and generalised IoU of boxes. Conversions between box formats are ``torchvision.ops.box_convert``.

``xyxy`` is (left, top, right, bottom), in pixels or normalised.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

NO_AREA = 1e-7
"""Smallest denominator of the IoU. On a 1008 px canvas with sides of length 1, a square of this area is 0.3 px wide."""


def iou(first: Float[Tensor, "*n 4"], second: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Compute the IoU of pairs of boxes, in 0..1, with the arguments and the conventions of ``giou``."""
    overlap, union, _ = _areas(first.float(), second.float())
    return overlap / union.clamp(min=NO_AREA)


def giou(first: Float[Tensor, "*n 4"], second: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Compute the generalised IoU of pairs of boxes, in float32.

    If the corners of a box are swapped, the box between the two corners is used. Denominators are at least ``NO_AREA``.
    Boxes without area therefore have IoU 0, and a pair whose hull has no area has the value 0 and a finite gradient,
    where the formula would divide zero by zero.

    Args:
        first: Boxes in xyxy format, of shape (..., 4).
        second: Boxes in xyxy format and in the same unit. The shapes may broadcast.

    Returns:
        Values in -1..1, of the broadcast shape without the last dimension.

    Source:
        Rezatofighi et al., Generalized Intersection over Union, 2019.
    """
    overlap, union, hull = _areas(first.float(), second.float())
    return overlap / union.clamp(min=NO_AREA) - (hull - union) / hull.clamp(min=NO_AREA)


def _areas(first: Float[Tensor, "*n 4"], second: Float[Tensor, "*n 4"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the areas of the intersection, the union and the hull of pairs of boxes."""
    low_a, high_a = torch.minimum(first[..., :2], first[..., 2:]), torch.maximum(first[..., :2], first[..., 2:])
    low_b, high_b = torch.minimum(second[..., :2], second[..., 2:]), torch.maximum(second[..., :2], second[..., 2:])
    overlap = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1)
    return overlap, (high_a - low_a).prod(-1) + (high_b - low_b).prod(-1) - overlap, hull
