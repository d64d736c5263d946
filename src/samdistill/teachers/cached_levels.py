"""One pyramid level of the frames of videos as a detector gave it before: read by video and frame from a store."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from ..store import FeatureStore
from ..types import UserError


def frame_key(key: str, frame: int) -> str:
    """The record of one frame of a video."""
    return f"{key}@{frame}"


class CachedLevels:
    """Reads what the cache of the video job wrote, a record for each annotated frame. Pickles to loader workers, as its
    store does."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def read(self, key: str, frames: Sequence[int]) -> Float[Tensor, "t c h w"]:
        """The maps of some frames of a video in the order of ``frames`` (repeats allowed), in float32 on the CPU.

        Raises ``UserError`` that names a frame without a record, or with a damaged one.
        """
        missing = self.missing(key, frames)
        if missing:
            raise UserError(
                f"{self.store.root}: frame {missing[0]} of {key} is not cached ({len(frames) - len(missing)} of "
                f"{len(frames)} are); run `samdistill cache` with this config again"
            )
        return self.store.read_batch([frame_key(key, frame) for frame in frames])[1]

    def missing(self, key: str, frames: Sequence[int]) -> list[int]:
        """Those of ``frames`` that have no record."""
        return [frame for frame in frames if frame_key(key, frame) not in self.store]
