"""Prompts derived from masks: tight boxes and centre points for evaluation, random prompts for training.

A random prompt depends on the view's seed (``view_seed``), the number of the draw and the slot only. Points are pixel
indices. Boxes are xyxy at the outer edges of pixels.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..config import PromptsConfig
from ..ops.masks import centre_points, masks_to_boxes
from ..ops.sights import tight_box
from ..types import Prompts, UserError
from .transforms import Size

BAND = 0.25
"""Width of the area around an object in which negative points are drawn, as a fraction of the sides of its box.

Masks leak into the surroundings of an object, and users click there to correct them. A point far away adds little
information.
"""
LEAST_BAND = 1 / 64
"""Smallest width of that area as a fraction of the canvas: one cell of SAM's image embedding."""
_REVISION = 1  # part of the fingerprint; increase it if a change to this module changes prompts
_IDLE = {
    "point": ("box_jitter", "grid_points"),
    "box": ("points", "negative_points", "grid_points"),
    "mixed": ("grid_points",),
    "everything": ("points", "negative_points", "box_jitter"),
}
"""Settings that have no effect in a mode, and so are left out of the fingerprint."""


def pad_masks(masks: Sequence[Bool[Tensor, "n h w"]]) -> tuple[Bool[Tensor, "b m h w"], Bool[Tensor, "b m"]]:
    """Stack the masks of b images, with n masks each, to m = the largest n.

    Returns:
        Masks (b, m, h, w), and which slots are valid, (b, m). A slot with an empty mask, for instance of an object
        smaller than a canvas pixel, is not valid, because it cannot be prompted.
    """
    most = max(len(m) for m in masks)
    padded = torch.stack([torch.cat([m, m.new_zeros(most - len(m), *m.shape[1:])]) for m in masks])
    return padded, padded.flatten(2).any(-1)


def box_prompts(masks: Bool[Tensor, "b n h w"], valid: Bool[Tensor, "b n"]) -> Prompts:
    """Return the tight box of each mask as a prompt, xyxy in pixels of the masks."""
    return Prompts(valid, boxes=masks_to_boxes(masks))


def point_prompts(masks: Bool[Tensor, "b n h w"], valid: Bool[Tensor, "b n"]) -> Prompts:
    """Return one positive point per mask: the pixel that is farthest from the outside of the mask."""
    points = centre_points(masks.flatten(0, 1)).view(*masks.shape[:2], 1, 2).float()
    return Prompts(valid, points=points, labels=torch.ones(points.shape[:3], dtype=torch.int64, device=masks.device))


class Ask(NamedTuple):
    """Types and numbers of prompts for each object of an image, equal in every draw.

    Attributes:
        box: Whether there is a box.
        positives: Number of points on the object.
        negatives: Number of points beside the object.
    """

    box: bool
    positives: int
    negatives: int

    @property
    def ambiguous(self) -> bool:
        """Whether the prompt is a single positive point, for which SAM predicts three masks."""
        return self == (False, 1, 0)


def draw_ask(config: PromptsConfig, seed: int) -> Ask:
    """Draw the types and numbers of prompts of a view.

    In the mode ``mixed``, points, a box, and a box with points have equal probability.
    """
    rng = random.Random(f"ask/{seed}")
    kind = {"point": 0, "box": 1, "mixed": int(3 * rng.random()), "everything": 0}[config.mode]
    positives, negatives = (low + int((high - low + 1) * rng.random())
                            for low, high in (config.points, config.negative_points))  # fmt: skip
    if config.mode == "everything":
        return Ask(False, 1, 0)
    return Ask(True, 0, 0) if kind == 1 else Ask(kind == 2, positives, negatives)


def draw_prompts(
    masks: Bool[Tensor, "n s s"], size: Size, ask: Ask, config: PromptsConfig, seed: int, draw: int = 0
) -> Prompts:
    """Draw prompts for n objects of one image.

    Every draw and every slot has a random stream of its own, so an object in two slots gets two different prompts.

    Args:
        masks: Masks on the canvas, none of them empty.
        size: Height and width of the part of the canvas that is not padding.
        ask: Types and numbers of prompts.
        config: Settings of the prompts.
        seed: Seed of the view.
        draw: Number of the candidate.

    Returns:
        Prompts with b = 1.
    """
    boxes, points, labels = [], [], []
    for slot, mask in enumerate(masks.numpy()):
        tight = tight_box(mask)
        if ask.box:
            rng = random.Random(f"box/{seed}/{draw}/{slot}")
            boxes.append(jittered(tight, size, config.box_jitter, rng))
        if ask.positives:
            clicks, kinds = _clicks(mask, tight, size, ask, random.Random(f"points/{seed}/{draw}/{slot}"))
            points.append(clicks)
            labels.append(kinds)
    return Prompts(
        torch.ones(1, len(masks), dtype=torch.bool),
        torch.from_numpy(np.stack(points))[None].float() if points else None,
        torch.tensor(labels)[None] if labels else None,
        torch.tensor(boxes)[None] if boxes else None,
    )


def jittered(
    tight: tuple[int, int, int, int], size: Size, deviation: float, rng: random.Random
) -> tuple[float, float, float, float]:
    """Move each edge of a box by a normally distributed offset, limited to two standard deviations.

    The box is clipped to the image. If less than a pixel is left along an axis, the tight edges are kept on this axis.

    Args:
        tight: Tight box, xyxy in pixels.
        size: Height and width of the image.
        deviation: Standard deviation as a fraction of the side of the box.
        rng: Random stream.
    """
    edges = [0.0] * 4
    noise = [max(-2.0, min(2.0, rng.gauss(0.0, 1.0))) * deviation for _ in range(4)]
    for low, high, end in ((0, 2, size[1]), (1, 3, size[0])):
        side = tight[high] - tight[low]
        start, stop = (min(max(tight[i] + noise[i] * side, 0.0), float(end)) for i in (low, high))
        edges[low], edges[high] = (start, stop) if stop - start >= 1 else (float(tight[low]), float(tight[high]))
    return edges[0], edges[1], edges[2], edges[3]


def _clicks(
    mask: Bool[np.ndarray, "s s"], tight: tuple[int, int, int, int], size: Size, ask: Ask, rng: random.Random
) -> tuple[Int[np.ndarray, "p 2"], list[int]]:
    """Draw positive points, then negative points, and their labels.

    If the object covers the whole image, there is no pixel for negative points. Positive points replace them, so that
    every object of a group has the same number of points.
    """
    inside = _pixels(mask, tight, ask.positives, rng)
    if not ask.negatives:
        return inside, [1] * ask.positives
    outside = ~mask
    beside = _pixels(outside, _band(tight, size, len(mask)), ask.negatives, rng)
    if not len(beside):
        beside = _pixels(outside, (0, 0, size[1], size[0]), ask.negatives, rng)
    label = 0 if len(beside) else 1
    if not len(beside):
        beside = _pixels(mask, tight, ask.negatives, rng)
    return np.concatenate([inside, beside]), [1] * ask.positives + [label] * ask.negatives


def _band(tight: tuple[int, int, int, int], size: Size, canvas: int) -> tuple[int, int, int, int]:
    """Return the box in which negative points are drawn: the tight box and its surroundings, clipped to the image."""
    left, top, right, bottom = tight
    x, y = (int(max(BAND * side, LEAST_BAND * canvas, 1)) for side in (right - left, bottom - top))
    return max(left - x, 0), max(top - y, 0), min(right + x, size[1]), min(bottom + y, size[0])


def _pixels(
    region: Bool[np.ndarray, "s s"], box: tuple[int, int, int, int], count: int, rng: random.Random
) -> Int[np.ndarray, "p 2"]:
    """Draw ``count`` True pixels of ``region`` inside ``box``, uniformly.

    Pixels are repeated only if there are fewer than ``count``. If there is none, the result is empty.

    Returns:
        x, y of each pixel.
    """
    left, top, right, bottom = box
    places = np.flatnonzero(region[top:bottom, left:right])
    drawn: dict[int, None] = {}
    while len(drawn) < min(count, len(places)):
        drawn[int(rng.random() * len(places))] = None
    order = list(drawn) * count
    rows, columns = np.divmod(places[order[:count]], right - left)
    return np.stack([columns + left, rows + top], -1)


def grid_points(size: Size, per_side: int) -> Int[np.ndarray, "p 2"]:
    """Return x, y of the pixels at the cell centres of a regular grid over an image of ``size``, row by row."""
    rows, columns = (((np.arange(per_side) + 0.5) * side / per_side).astype(np.int64) for side in size)
    return np.stack([np.tile(columns, per_side), np.repeat(rows, per_side)], -1)


def draw_grid(
    masks: Sequence[Bool[Tensor, "s s"]], size: Size, config: PromptsConfig, seed: int
) -> tuple[list[int], tuple[Prompts, ...]]:
    """Draw the point prompts of the mode ``everything``.

    The ground truth of a grid point is the smallest mask that contains it, or no mask. A point is repeated only after
    all were drawn. If any grid point is on a mask, at least one of the drawn points is. The other candidates of a slot
    are points with the same mask, or without a mask.

    Args:
        masks: Masks on the canvas.
        size: Height and width of the part of the canvas that is not padding.
        config: Settings of the prompts.
        seed: Seed of the view.

    Returns:
        For each of ``config.objects`` slots, the number of its mask, or -1; and the prompts of each candidate.
    """
    points = grid_points(size, config.grid_points)
    owners = np.full(len(points), -1)
    for number in sorted(range(len(masks)), key=lambda i: -np.count_nonzero(masks[i].numpy())):
        owners[masks[number].numpy()[points[:, 1], points[:, 0]]] = number
    deck = shuffled(len(points), random.Random(f"grid/{seed}"))
    slots = [deck[slot % len(deck)] for slot in range(config.objects)]
    owned = [place for place in deck if owners[place] >= 0]
    if owned and not any(owners[place] >= 0 for place in slots):
        slots[-1] = owned[0]
    draws = [slots]
    for draw in range(1, config.candidates):
        rng = random.Random(f"grid/{seed}/{draw}")
        alike = (np.flatnonzero(owners == owners[place]) for place in slots)
        draws.append([int(places[int(rng.random() * len(places))]) for places in alike])
    shape = 1, config.objects, 1
    valid, labels = torch.ones(shape[:2], dtype=torch.bool), torch.ones(shape, dtype=torch.int64)
    prompts = (torch.from_numpy(points[draw]).float().view(*shape, 2) for draw in draws)
    return owners[slots].tolist(), tuple(Prompts(valid, xy, labels) for xy in prompts)


def shuffled(count: int, rng: random.Random) -> list[int]:
    """Return the numbers from 0 to ``count - 1`` in random order."""
    return sorted(range(count), key=lambda _: rng.random())


def prompts_fingerprint(prompts: PromptsConfig, seed: int) -> str:
    """Return 16 hexadecimal digits computed from all settings that determine the prompts for given views and masks.

    Settings of correction points, which depend on predictions, and settings without effect in the mode are left out.
    """
    settings = prompts.model_dump(mode="json", exclude={"rounds", "click", *_IDLE[prompts.mode]})
    settings |= {"revision": _REVISION, "seed": seed}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def check_prompts(prompts: Prompts, sizes: Int[Tensor, "b 2"]) -> None:
    """Check that points and boxes are inside their images.

    Invalid slots and padding points (label -10) are ignored.

    Args:
        prompts: Prompts for b images.
        sizes: Height and width of each image in the pixels of the prompts, (b, 2).

    Raises:
        UserError: A point or a box is outside its image, or a box has no area. The message names the first one.
    """
    limit = sizes.flip(-1).to(prompts.valid.device)[:, None]
    if prompts.points is not None:
        on = ((prompts.points >= 0) & (prompts.points < limit[:, :, None])).all(-1)
        wrong = prompts.valid[..., None] & ~on
        if prompts.labels is not None:
            wrong = wrong & (prompts.labels != -10)
        _refuse("point", prompts.points, wrong, sizes, "is outside the image")
    if prompts.boxes is not None:
        first, last = prompts.boxes[..., :2], prompts.boxes[..., 2:]
        on = ((first >= 0) & (first <= limit) & (last >= 0) & (last <= limit)).all(-1)
        _refuse("box", prompts.boxes, prompts.valid & ~on, sizes, "reaches outside the image")
        _refuse("box", prompts.boxes, prompts.valid & ~(last > first).all(-1), sizes,
                "has no area (give left, top, right, bottom) in the image")  # fmt: skip


def _refuse(what: str, values: Tensor, wrong: Bool[Tensor, "b n *p"], sizes: Int[Tensor, "b 2"], why: str) -> None:
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        height, width = sizes[at[0]].tolist()
        shown = ", ".join(f"{value:g}" for value in values[tuple(at)].tolist())
        raise UserError(f"image {at[0]}, object {at[1]}: {what} ({shown}) {why} of {width} x {height} pixels")
