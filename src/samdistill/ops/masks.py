"""Geometry of binary masks: IoU, bounding boxes, centre points and click prompts."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from .sights import tight_box


def mask_iou(first: Bool[Tensor, "*n h w"], second: Bool[Tensor, "*n h w"]) -> Float[Tensor, "*n"]:
    """Compute the intersection over union of pairs of masks.

    Args:
        first: Masks of shape (..., h, w).
        second: Masks of the same shape.

    Returns:
        float32 values in 0..1 of shape (...). The IoU of two empty masks is 1.
    """
    union = (first | second).flatten(-2).sum(-1)
    overlap = (first & second).flatten(-2).sum(-1)
    return torch.where(union > 0, overlap / union.clamp(min=1), 1.0)


def masks_to_boxes(masks: Bool[Tensor, "*n h w"]) -> Float[Tensor, "*n 4"]:
    """Compute the tight bounding box of each mask.

    Box edges are pixel edges: a mask with one pixel at x = 3 has left 3 and right 4.

    Args:
        masks: Masks of shape (..., h, w).

    Returns:
        float32 boxes in xyxy format in pixels, of shape (..., 4). The box of an empty mask is all zeros.
    """
    height, width = masks.shape[-2:]
    rows, columns = masks.any(-1), masks.any(-2)
    x = torch.arange(width, device=masks.device)
    y = torch.arange(height, device=masks.device)
    left, right = torch.where(columns, x, width).amin(-1), torch.where(columns, x + 1, 0).amax(-1)
    top, bottom = torch.where(rows, y, height).amin(-1), torch.where(rows, y + 1, 0).amax(-1)
    boxes = torch.stack([left, top, right, bottom], -1).float()
    return boxes * rows.any(-1)[..., None]


def _deepest(mask: np.ndarray) -> tuple[int, int, float]:
    """Find the pixel with the greatest distance to the outside of ``mask``.

    The distance transform runs on the tight crop of the mask. The result is the same as on the whole mask, because the
    pixels around the crop are outside the mask and nearer than any pixel beyond them.

    Returns:
        x, y and distance in pixels. All are 0 for an empty mask.
    """
    left, top, right, bottom = tight_box(mask)
    if right == left:
        return 0, 0, 0.0
    crop = mask[top:bottom, left:right]
    depth = distance_transform_edt(np.pad(crop, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return int(left + column), int(top + row), float(depth[row, column])


def centre_points(masks: Bool[Tensor, "n h w"]) -> Int[Tensor, "n 2"]:
    """Find the pixel of each mask with the greatest distance to the outside.

    The image border counts as outside. This is the usual first click of interactive segmentation.

    Args:
        masks: Masks of shape (n, h, w).

    Returns:
        x, y in pixels, of shape (n, 2), on the device of ``masks``. Zeros for an empty mask.

    Source:
        Sofiiuk et al., Reviving Iterative Training with Mask Guidance (RITM), 2021.
    """
    points = [_deepest(mask)[:2] for mask in masks.cpu().numpy()]
    return torch.tensor(points, dtype=torch.int64, device=masks.device).reshape(-1, 2)


def random_points(
    masks: Bool[Tensor, "n h w"], draws: Float[Tensor, " n"]
) -> tuple[Int[Tensor, "n 2"], Bool[Tensor, " n"]]:
    """Select one pixel of each mask at random.

    A draw d selects the pixel ``floor(d * count)`` of the mask's ``count`` pixels, row by row. A point therefore
    depends only on its own mask and draw.

    Args:
        masks: Masks of shape (n, h, w).
        draws: One uniform random number in [0, 1) per mask, of shape (n,).

    Returns:
        x, y in pixels, of shape (n, 2), zeros for an empty mask; and whether each mask has a pixel, of shape (n,).
    """
    rows = masks.sum(-1)
    count, index = rows.sum(-1), torch.arange(len(masks), device=masks.device)
    wanted = (draws * count).long().minimum(count - 1).clamp(min=0)
    ends = rows.cumsum(-1)
    y = (ends <= wanted[:, None]).sum(-1).clamp(max=masks.shape[-2] - 1)
    before = wanted - (ends - rows)[index, y]
    x = (masks[index, y].cumsum(-1) <= before[:, None]).sum(-1).clamp(max=masks.shape[-1] - 1)
    found = count > 0
    return torch.stack([x, y], -1) * found[:, None], found


def error_points(
    predicted: Bool[Tensor, "n h w"], target: Bool[Tensor, "n h w"], draws: Float[Tensor, " n"] | None = None
) -> tuple[Int[Tensor, "n 2"], Int[Tensor, " n"]]:
    """Compute the corrective click on each prediction.

    Without ``draws``, the click is the centre of the deeper one of two error regions: the pixels that the prediction
    misses and those that it adds. With ``draws`` it is a random pixel of the region with more pixels. If the prediction
    has no error, the click is in the target, with label 1.

    Args:
        predicted: Predicted masks of shape (n, h, w).
        target: True masks of the same shape.
        draws: One uniform random number in [0, 1) per mask (see ``random_points``), or None for centre clicks.

    Returns:
        x, y in pixels, of shape (n, 2); and labels of shape (n,): 1 if the prediction misses the pixel, 0 if it adds
        it.

    Source:
        SAM also trains with random clicks, but draws them from both regions together (Kirillov et al., Segment
        Anything, 2023).
    """
    missed, spilled = target & ~predicted, predicted & ~target
    if draws is not None:
        return _random_error_points(missed, spilled, target, draws)
    points, labels = [], []
    for miss, spill, whole in zip(missed.cpu().numpy(), spilled.cpu().numpy(), target.cpu().numpy(), strict=True):
        spilled_at, missed_at = _deepest(spill), _deepest(miss)
        label = int(missed_at[2] >= spilled_at[2])
        click = missed_at if label else spilled_at
        points.append((click if click[2] > 0 else _deepest(whole))[:2])
        labels.append(label)
    at = {"dtype": torch.int64, "device": predicted.device}
    return torch.tensor(points, **at).reshape(-1, 2), torch.tensor(labels, **at)


def _random_error_points(
    missed: Bool[Tensor, "n h w"], spilled: Bool[Tensor, "n h w"], target: Bool[Tensor, "n h w"],
    draws: Float[Tensor, " n"],
) -> tuple[Int[Tensor, "n 2"], Int[Tensor, " n"]]:  # fmt: skip
    """Draw a pixel of the larger error region. If both are empty, draw one of the target, with label 1."""
    counts = missed.flatten(1).sum(1), spilled.flatten(1).sum(1)
    positive = counts[0] >= counts[1]
    region = torch.where(positive[:, None, None], missed, spilled)
    perfect = (counts[0] + counts[1] == 0)[:, None, None]
    return random_points(torch.where(perfect, target, region), draws)[0], positive.long()
