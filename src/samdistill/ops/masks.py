"""Mask geometry: boxes, centre points, IoU. Pure functions of tensors."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.ndimage import distance_transform_edt
from torch import Tensor


def mask_iou(first: Bool[Tensor, "*n h w"], second: Bool[Tensor, "*n h w"]) -> Float[Tensor, "*n"]:
    """Intersection over union of each pair; 1 where both are empty."""
    union = (first | second).flatten(-2).sum(-1)
    overlap = (first & second).flatten(-2).sum(-1)
    return torch.where(union > 0, overlap / union.clamp(min=1), 1.0)


def masks_to_boxes(masks: Bool[Tensor, "*n h w"]) -> Float[Tensor, "*n 4"]:
    """Tight xyxy boxes whose edges are pixel edges: a single pixel at x=3 spans 3..4. Zeros for an empty mask."""
    height, width = masks.shape[-2:]
    rows, columns = masks.any(-1), masks.any(-2)
    x = torch.arange(width, device=masks.device)
    y = torch.arange(height, device=masks.device)
    left, right = torch.where(columns, x, width).amin(-1), torch.where(columns, x + 1, 0).amax(-1)
    top, bottom = torch.where(rows, y, height).amin(-1), torch.where(rows, y + 1, 0).amax(-1)
    boxes = torch.stack([left, top, right, bottom], -1).float()
    return boxes * rows.any(-1)[..., None]


def tight_box(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """left, top, right, bottom of one mask as ``masks_to_boxes`` has them, at a fraction of its time on a CPU."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _deepest(mask: np.ndarray) -> tuple[int, int, float]:
    """x, y and depth of the pixel farthest from the outside of ``mask``; zeros for an empty one.

    Only the tight crop is measured: its frame is outside and nearer than whatever lies beyond, so nothing changes.
    """
    left, top, right, bottom = tight_box(mask)
    if right == left:
        return 0, 0, 0.0
    crop = mask[top:bottom, left:right]
    depth = distance_transform_edt(np.pad(crop, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return int(left + column), int(top + row), float(depth[row, column])


def centre_points(masks: Bool[Tensor, "n h w"]) -> Int[Tensor, "n 2"]:
    """For each mask the x, y of the pixel farthest from its outside (image borders count as outside).

    The usual first click of interactive segmentation (Sofiiuk et al., RITM, 2021). Zeros for an empty mask.
    """
    points = [_deepest(mask)[:2] for mask in masks.cpu().numpy()]
    return torch.tensor(points, dtype=torch.int64, device=masks.device).reshape(-1, 2)


def random_points(
    masks: Bool[Tensor, "n h w"], draws: Float[Tensor, " n"]
) -> tuple[Int[Tensor, "n 2"], Bool[Tensor, " n"]]:
    """A pixel (x, y) of each mask, and whether the mask has any; ``draws``: a uniform number in [0, 1) for each.

    A draw of d takes pixel ``floor(d * count)`` in reading order, so a point depends on its own mask and draw alone.
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
    """The corrective click on each prediction: centre of the deeper error region, and its label.

    Label 1 where the prediction misses object, 0 where it spills over; a perfect prediction gets the target's centre.
    With ``draws`` (see ``random_points``) the click is instead any pixel of the region that has more of them; SAM's
    training clicks are random too (Kirillov et al., 2023), over both regions together.
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
    """A random pixel of the larger region; where both are empty, of the target, with label 1."""
    counts = missed.flatten(1).sum(1), spilled.flatten(1).sum(1)
    positive = counts[0] >= counts[1]
    region = torch.where(positive[:, None, None], missed, spilled)
    perfect = (counts[0] + counts[1] == 0)[:, None, None]
    return random_points(torch.where(perfect, target, region), draws)[0], positive.long()
