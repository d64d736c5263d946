"""Prompts made from masks: the tight box and the centre point that the field evaluates with, and seeded draws to
train with.

Every draw follows from the view's seed (``view_seed``), its number and the slot alone. Points are indices of pixels,
boxes lie on their edges.
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
from ..ops.masks import centre_points, masks_to_boxes, tight_box
from ..types import Prompts, UserError
from .transforms import Size

BAND = 0.25
"""How far around an object negative points are drawn, as a share of its box's sides.

A click far away says nothing that the others have not said. The neighbourhood is where masks leak to, and where people
click when they do.
"""
LEAST_BAND = 1 / 64
"""The least width of that band, as a share of the canvas: one cell of SAM's embedding, which tells little apart."""
_REVISION = 1  # part of the fingerprint: raise it when a change here changes prompts
_IDLE = {
    "point": ("box_jitter", "grid_points"),
    "box": ("points", "negative_points", "grid_points"),
    "mixed": ("grid_points",),
    "everything": ("points", "negative_points", "box_jitter"),
}


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


class Ask(NamedTuple):
    """How an image is asked about each of its objects, in every draw: with a box or without, with so many points."""

    box: bool
    positives: int
    negatives: int

    @property
    def ambiguous(self) -> bool:
        """One positive point and nothing else, which SAM answers with three masks."""
        return self == (False, 1, 0)


def draw_ask(config: PromptsConfig, seed: int) -> Ask:
    """The way of a view. ``mixed``: a point prompt, a box, or a box with points, one as likely as another."""
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
    """Prompts about n objects of one image, none of them empty; b is 1. ``size``: of the canvas' unpadded part.

    draw: number of the candidate; each has its own stream, and so has each slot: an object in two slots is asked for in
    two ways.
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
    """A box as a hand would draw it: each edge off by a share of the side, two standard deviations at most.

    It stays on the image. An axis on which less than a pixel would be left keeps its tight edges.
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
    """Positive points, then negative ones. An object that fills the image leaves no room for these: more positive ones
    take their place, so that every object of a group has as many points."""
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
    left, top, right, bottom = tight
    x, y = (int(max(BAND * side, LEAST_BAND * canvas, 1)) for side in (right - left, bottom - top))
    return max(left - x, 0), max(top - y, 0), min(right + x, size[1]), min(bottom + y, size[0])


def _pixels(
    region: Bool[np.ndarray, "s s"], box: tuple[int, int, int, int], count: int, rng: random.Random
) -> Int[np.ndarray, "p 2"]:
    """x, y of ``count`` True pixels of ``region`` in ``box``, uniformly; none twice unless there are fewer than that.

    None at all where there is none.
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
    """x, y of the pixels under the cell centres of a grid over an image of ``size``, row by row."""
    rows, columns = (((np.arange(per_side) + 0.5) * side / per_side).astype(np.int64) for side in size)
    return np.stack([np.tile(columns, per_side), np.repeat(rows, per_side)], -1)


def draw_grid(
    masks: Sequence[Bool[Tensor, "s s"]], size: Size, config: PromptsConfig, seed: int
) -> tuple[list[int], tuple[Prompts, ...]]:
    """The prompts of ``everything``: for each of ``config.objects`` slots the number of its mask, and the candidates.

    A point stands for the smallest mask under it, or for none (-1). None is drawn twice before each was drawn once, and
    one of them is on a mask if any grid point is. Other candidates are other points of the same mask, or of none.
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
    """0 to ``count`` in random order."""
    return sorted(range(count), key=lambda _: rng.random())


def prompts_fingerprint(prompts: PromptsConfig, seed: int) -> str:
    """16 hex digits over everything that decides what is drawn from given views and masks.

    Clicks that follow an answer are not drawn beforehand, and settings of another mode decide nothing.
    """
    settings = prompts.model_dump(mode="json", exclude={"rounds", "click", *_IDLE[prompts.mode]})
    settings |= {"revision": _REVISION, "seed": seed}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def check_prompts(prompts: Prompts, sizes: Int[Tensor, "b 2"]) -> None:
    """Refuse points and boxes that are not on their image. ``sizes``: height and width, in the prompts' pixels.

    Slots that are not valid and padding points (label -10) are passed over. Raises ``UserError`` that names the first
    such coordinate and the size of its image.
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
