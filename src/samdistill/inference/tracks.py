"""State of a video session without the model: its tracked objects and its memory of past frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..data.transforms import Size
from ..ops.masks import tight_box


@dataclass(frozen=True, eq=False)
class Tracked:
    """One object in one frame.

    Attributes:
        object_id: Its id in the session.
        phrase: The phrase that it was found or named with, or None.
        score: Score in 0..1. An object that the model looked for and did not find has a score too. 0 if the model did
            not look for it.
        visible: Whether it was found and its mask is not empty.
        mask: Mask in pixels of the frame, (h, w); empty if it is not visible.
        box: Box tight around the mask, xyxy in pixels; zeros if it is not visible.
    """

    object_id: int
    phrase: str | None
    score: float
    visible: bool
    mask: Bool[np.ndarray, "h w"]
    box: tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Sight:
    """One instance in one frame.

    Attributes:
        score: Score in 0..1.
        mask: Mask in pixels of the frame, never empty.
        box: Box tight around the mask, xyxy in pixels.
        area: Number of pixels of the mask.
    """

    score: float
    mask: Bool[np.ndarray, "h w"]
    box: tuple[int, int, int, int]
    area: int

    @classmethod
    def of(cls, score: float, mask: Bool[np.ndarray, "h w"]) -> Sight | None:
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


def assign(tracks: Sequence[Track], found: Sequence[Sight]) -> dict[int, Sight]:
    """Assign instances to objects so that the sum of IoUs with each object's last visible mask is greatest.

    An instance is assigned to at most one object, and only to an object that it overlaps.

    Returns:
        The instance of each assigned object, by object id.
    """
    shares = np.array([[overlap(track.last, sight) for sight in found] for track in tracks])
    if not shares.size:
        return {}
    pairs = zip(*linear_sum_assignment(shares, maximize=True), strict=True)
    return {tracks[row].object_id: found[column] for row, column in pairs if shares[row, column] > 0}


class Memory(NamedTuple):
    """Memory inputs of ``EfficientSam3Model.forward_video`` for one image. All None: no memory."""

    features: Float[Tensor, "1 f c h w"] | None = None
    ages: Float[Tensor, "1 f"] | None = None
    valid: Bool[Tensor, "1 f"] | None = None
    masks: Float[Tensor, "p f h w"] | None = None


@dataclass(frozen=True, eq=False)
class _Remembered:
    number: int
    features: Float[Tensor, "c h w"]
    marks: Mapping[int, Float[Tensor, "h w"]]


class Ring:
    """A memory of ``length`` frames: their features, and the fraction of each grid cell that each object covers.

    If only the latest frames were kept, an object that is occluded for longer could not be found again. Therefore the
    last frame that shows an object is kept while later frames are dropped. At most half of the slots are used for this.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._frames: list[_Remembered] = []

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, number: int, features: Float[Tensor, "c h w"], marks: Mapping[int, Float[Tensor, "h w"]]) -> None:
        """Add frame ``number`` with the marks of its visible objects, by object id. A full memory drops a frame."""
        self._frames.append(_Remembered(number, features, marks))
        if len(self._frames) > self.length:
            del self._frames[self._leaves()]

    def _leaves(self) -> int:
        """Return the index of the frame to drop.

        That is the oldest frame that is not the last to show some object. If too many frames are, it is the oldest one.
        """
        for place, frame in enumerate(self._frames[: self.length // 2 + 1]):
            later = set().union(*(other.marks for other in self._frames[place + 1 :]))
            if frame.marks.keys() <= later:
                return place
        return 0

    @property
    def marked(self) -> set[int]:
        """Ids of the objects that are visible in a frame of the memory."""
        return set().union(*(frame.marks for frame in self._frames))

    def recall(self, number: int, stride: int, objects: Sequence[int] = ()) -> Memory:
        """Return the memory inputs for frame ``number``, oldest frame first. All are None if the memory is empty.

        Ages are in units of ``stride`` frames. They are clamped to ``length``, the largest age in training.

        Args:
            number: Number of the current frame.
            stride: Frames between two frames of the memory.
            objects: Ids of the objects whose marks are returned, one row each. () for no marks.
        """
        if not self._frames:
            return Memory()
        features = torch.stack([frame.features for frame in self._frames])[None]
        ages = [min((number - frame.number) / stride, self.length) for frame in self._frames]
        past = torch.tensor([ages], device=features.device)
        nowhere = features.new_zeros(features.shape[-2:])
        rows = [torch.stack([frame.marks.get(one, nowhere) for frame in self._frames]) for one in objects]
        return Memory(features, past, torch.ones_like(past, dtype=torch.bool), torch.stack(rows) if rows else None)
