"""Box conversions and overlap.

``xyxy``: left, top, right, bottom edge; ``xywh``: left, top edge, width, height; ``cxcywh``: centre, width, height.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

NO_AREA = 1e-7
"""Areas below this count as none. A third of a pixel squared where 1 is the side of a 1008 px canvas."""


def xyxy_to_xywh(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1)


def cxcywh_to_xyxy(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def xyxy_to_cxcywh(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def giou(first: Float[Tensor, "*n 4"], second: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Generalised IoU of each pair of xyxy boxes (Rezatofighi et al., 2019), in float32; shapes may broadcast.

    In -1..1. A reversed box is the box between the same two corners. Boxes without an area have IoU 0, and a pair whose
    hull has none is not pushed apart: 0 and a finite gradient, where the formula divides zero by zero.
    """
    first, second = first.float(), second.float()
    low_a, high_a = torch.minimum(first[..., :2], first[..., 2:]), torch.maximum(first[..., :2], first[..., 2:])
    low_b, high_b = torch.minimum(second[..., :2], second[..., 2:]), torch.maximum(second[..., :2], second[..., 2:])
    overlap = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1)
    union = (high_a - low_a).prod(-1) + (high_b - low_b).prod(-1) - overlap
    return overlap / union.clamp(min=NO_AREA) - (hull - union) / hull.clamp(min=NO_AREA)


def pairwise_giou(first: Float[Tensor, "*b n 4"], second: Float[Tensor, "*b m 4"]) -> Float[Tensor, "*b n m"]:
    """``giou`` of every box of ``first`` with every box of ``second``."""
    return giou(first[..., :, None, :], second[..., None, :, :])
