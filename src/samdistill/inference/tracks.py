"""State of a video session without the model: its memory of past frames, and which instance is which object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..ops.sights import Sight, Track, overlap, to_drop


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

    ``to_drop`` says which frame leaves a full memory.
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
            del self._frames[to_drop([frame.marks.keys() for frame in self._frames], self.length)]

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
