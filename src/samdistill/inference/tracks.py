"""The objects of a session, and the past frames that it remembers: plain bookkeeping, no model is asked here."""

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
    """One object in one frame. phrase: what it was called when it was added, None for an object without a name.

    score: 0..1, of an object that was asked about and not found too; 0 without a question. visible: it was found and
    has a pixel. mask: in pixels of the frame, empty where not visible. box: xyxy around the mask, edge to edge; zeros
    where not visible.
    """

    object_id: int
    phrase: str | None
    score: float
    visible: bool
    mask: Bool[np.ndarray, "h w"]
    box: tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Sight:
    """One instance in one frame. mask: in pixels of the frame, never empty. box: tight around it. area: its pixels."""

    score: float
    mask: Bool[np.ndarray, "h w"]
    box: tuple[int, int, int, int]
    area: int

    @classmethod
    def of(cls, score: float, mask: Bool[np.ndarray, "h w"]) -> Sight | None:
        """None for an empty mask, which shows nothing."""
        area = int(np.count_nonzero(mask))
        return cls(score, mask, tight_box(mask), area) if area else None

    @classmethod
    def filled(cls, box: Sequence[float], size: Size) -> Sight:
        """Every pixel that ``box`` touches, which lies on the frame and has an area."""
        mask = np.zeros(size, bool)
        left, top, right, bottom = (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
        mask[top:bottom, left:right] = True
        return cls(1.0, mask, (left, top, right, bottom), (right - left) * (bottom - top))


@dataclass(eq=False)
class Track:
    """One object. asked: the words it is asked for with. last: where it was last seen."""

    object_id: int
    phrase: str | None
    asked: str
    last: Sight

    def tracked(self, sight: Sight | None, score: float) -> Tracked:
        """As ``sight`` shows it, or as invisible."""
        if sight is None:
            return Tracked(self.object_id, self.phrase, score, False, np.zeros_like(self.last.mask), (0.0,) * 4)
        left, top, right, bottom = map(float, sight.box)
        return Tracked(self.object_id, self.phrase, sight.score, True, sight.mask, (left, top, right, bottom))


def overlap(first: Sight, second: Sight) -> float:
    """IoU of two masks; only where their boxes meet is looked at."""
    left, top = max(first.box[0], second.box[0]), max(first.box[1], second.box[1])
    right, bottom = min(first.box[2], second.box[2]), min(first.box[3], second.box[3])
    if left >= right or top >= bottom:
        return 0.0
    common = np.count_nonzero(first.mask[top:bottom, left:right] & second.mask[top:bottom, left:right])
    return common / (first.area + second.area - common)


def apart(first: Sight, second: Sight) -> float:
    """Pixels between the centres of two boxes."""
    across, down = (first.box[i] + first.box[i + 2] - second.box[i] - second.box[i + 2] for i in (0, 1))
    return float(np.hypot(across, down)) / 2


def assign(tracks: Sequence[Track], found: Sequence[Sight]) -> dict[int, Sight]:
    """By id, the instance that an object is now: the sum of the overlaps with where each was last seen is greatest.

    No instance is two objects, and none is an object that it does not overlap.
    """
    shares = np.array([[overlap(track.last, sight) for sight in found] for track in tracks])
    if not shares.size:
        return {}
    pairs = zip(*linear_sum_assignment(shares, maximize=True), strict=True)
    return {tracks[row].object_id: found[column] for row, column in pairs if shares[row, column] > 0}


class Memory(NamedTuple):
    """What ``EfficientSam3Model.forward_video`` is told of the past, for one image; all None tells it nothing."""

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
    """The last ``length`` remembered frames: their features, and the share of each cell that an object covered.

    An object that hides longer than that would be forgotten, and never found again. So the frame that shows it last
    stays while the ones after it leave, in at most half of the places.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._frames: list[_Remembered] = []

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, number: int, features: Float[Tensor, "c h w"], marks: Mapping[int, Float[Tensor, "h w"]]) -> None:
        """marks: of the objects that frame ``number`` shows, by id."""
        self._frames.append(_Remembered(number, features, marks))
        if len(self._frames) > self.length:
            del self._frames[self._leaves()]

    def _leaves(self) -> int:
        """The oldest frame that no object needs; where too many are needed, the oldest of those."""
        for place, frame in enumerate(self._frames[: self.length // 2 + 1]):
            later = set().union(*(other.marks for other in self._frames[place + 1 :]))
            if frame.marks.keys() <= later:
                return place
        return 0

    @property
    def marked(self) -> set[int]:
        """Ids of the objects that some remembered frame shows."""
        return set().union(*(frame.marks for frame in self._frames))

    def recall(self, number: int, stride: int, objects: Sequence[int] = ()) -> Memory:
        """The past as frame ``number`` sees it, oldest first; ages in units of ``stride`` frames.

        No age is beyond what the memory was trained with: a frame that was kept for long counts as the oldest of those.

        objects: whose marks are told, a row for each; () tells none. With nothing remembered it tells nothing.
        """
        if not self._frames:
            return Memory()
        features = torch.stack([frame.features for frame in self._frames])[None]
        ages = [min((number - frame.number) / stride, self.length) for frame in self._frames]
        told = torch.tensor([ages], device=features.device)
        nowhere = features.new_zeros(features.shape[-2:])
        rows = [torch.stack([frame.marks.get(one, nowhere) for frame in self._frames]) for one in objects]
        return Memory(features, told, torch.ones_like(told, dtype=torch.bool), torch.stack(rows) if rows else None)
