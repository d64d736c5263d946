"""Prompts made from masks: the tight box and the centre point that the field evaluates with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from ..ops.masks import centre_points, masks_to_boxes
from ..types import Prompts


def pad_masks(masks: Sequence[Bool[Tensor, "n h w"]]) -> tuple[Bool[Tensor, "b m h w"], Bool[Tensor, "b m"]]:
    """Masks of b images, n of them each, to one tensor with m = the largest n, and which slots hold an object.

    A slot whose mask is empty (an object smaller than a canvas pixel) is not valid: nothing can point at it.
    """
    most = max(len(m) for m in masks)
    padded = torch.stack([torch.cat([m, m.new_zeros(most - len(m), *m.shape[1:])]) for m in masks])
    return padded, padded.flatten(2).any(-1)


def box_prompts(masks: Bool[Tensor, "b n h w"], valid: Bool[Tensor, "b n"]) -> Prompts:
    """The tight box of each mask, in the pixels of the masks' grid."""
    return Prompts(valid, boxes=masks_to_boxes(masks))


def point_prompts(masks: Bool[Tensor, "b n h w"], valid: Bool[Tensor, "b n"]) -> Prompts:
    """One positive click on each mask: the pixel farthest from its outside."""
    points = centre_points(masks.flatten(0, 1)).view(*masks.shape[:2], 1, 2).float()
    return Prompts(valid, points=points, labels=torch.ones(points.shape[:3], dtype=torch.int64, device=masks.device))
