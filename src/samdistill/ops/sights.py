"""Instances and tracked objects in the frames of a video, as NumPy masks.

This module imports NumPy alone, because it is also part of the ``predict.py`` of an export; see
``deployment/standalone.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

Size = tuple[int, int]
"""Height and width in pixels."""
MOST_OBJECTS = 20
"""Maximum number of objects of a session, equal to the maximum of a training clip."""
SAME = 0.5
"""Minimum IoU for two instances, or an instance and a box prompt, to be the same object."""
LEAST_SCORE = 0.05
"""Minimum score of an instance to be matched with a box prompt or with a tracked object."""


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Compute the box of one mask as ``ops.masks.masks_to_boxes`` does, but in less time on a CPU.

    Args:
        mask: Mask of shape (h, w), bool.

    Returns:
        left, top, right, bottom in pixels. All are 0 for an empty mask.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True, eq=False)
class Tracked:
    """One object in one frame.

    Attributes:
        object_id: Its id in the session.
        phrase: The phrase that it was found or named with, or None.
        score: Score in 0..1. An object that the model looked for and did not find has a score too. 0 if the model did
            not look for it.
        visible: Whether it was found and its mask is not empty.
        mask: Mask in pixels of the frame, bool of shape (h, w); empty if it is not visible.
        box: Box tight around the mask, xyxy in pixels; zeros if it is not visible.
    """

    object_id: int
    phrase: str | None
    score: float
    visible: bool
    mask: np.ndarray
    box: tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Sight:
    """One instance in one frame.

    Attributes:
        score: Score in 0..1.
        mask: Mask in pixels of the frame, bool of shape (h, w), never empty.
        box: Box tight around the mask, xyxy in pixels.
        area: Number of pixels of the mask.
    """

    score: float
    mask: np.ndarray
    box: tuple[int, int, int, int]
    area: int

    @classmethod
    def of(cls, score: float, mask: np.ndarray) -> Sight | None:
        """Return the instance of a mask, or None if the mask is empty."""
        area = int(np.count_nonzero(mask))
        return cls(score, mask, tight_box(mask), area) if area else None

    @classmethod
    def filled(cls, box: Sequence[float], size: Size) -> Sight:
        """Return a rectangular instance of all pixels that ``box`` (inside the frame, not empty) touches."""
        mask = np.zeros(size, bool)
        left, top, right, bottom = (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
        mask[top:bottom, left:right] = True
        return cls(1.0, mask, (left, top, right, bottom), (right - left) * (bottom - top))


@dataclass(eq=False)
class Track:
    """One tracked object: the prompt text used for it (``asked``), and its last visible instance (``last``)."""

    object_id: int
    phrase: str | None
    asked: str
    last: Sight

    def tracked(self, sight: Sight | None, score: float) -> Tracked:
        """Return the object with the mask of ``sight``, or as not visible if ``sight`` is None."""
        if sight is None:
            return Tracked(self.object_id, self.phrase, score, False, np.zeros_like(self.last.mask), (0.0,) * 4)
        left, top, right, bottom = map(float, sight.box)
        return Tracked(self.object_id, self.phrase, sight.score, True, sight.mask, (left, top, right, bottom))


def overlap(first: Sight, second: Sight) -> float:
    """Return the IoU of two masks. Only the intersection of their boxes is compared."""
    left, top = max(first.box[0], second.box[0]), max(first.box[1], second.box[1])
    right, bottom = min(first.box[2], second.box[2]), min(first.box[3], second.box[3])
    if left >= right or top >= bottom:
        return 0.0
    common = np.count_nonzero(first.mask[top:bottom, left:right] & second.mask[top:bottom, left:right])
    return common / (first.area + second.area - common)


def apart(first: Sight, second: Sight) -> float:
    """Return the distance of the centres of two boxes in pixels."""
    across, down = (first.box[i] + first.box[i + 2] - second.box[i] - second.box[i + 2] for i in (0, 1))
    return float(np.hypot(across, down)) / 2


def to_drop(marked: Sequence[Set[int]], length: int) -> int:
    """Return the index of the frame that leaves a full memory.

    If only the latest frames were kept, an object that is occluded for longer could not be found again. Therefore the
    oldest frame leaves that is not the last to show some object. At most half of the memory is kept for this; if too
    many frames are the last to show one, the oldest frame leaves.

    Args:
        marked: Ids of the objects that each frame shows, oldest frame first.
        length: Number of frames that the memory holds.
    """
    for place, shown in enumerate(marked[: length // 2 + 1]):
        if shown <= set().union(*marked[place + 1 :]):
            return place
    return 0
