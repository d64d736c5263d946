"""Files with the true and predicted masks of a video's objects, from the predicting process to the scoring ones.

This file does not import torch, because worker processes import it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8

from ..io import writing
from .video import ObjectMasks
from .video_frames import visibility_flags

_TRUTH = "truth"


class MaskFile:
    """Collect the masks of a video's objects frame by frame, eight pixels to a byte, and write them compressed.

    Args:
        size: Height and width of the masks in pixels.
        objects: Ids of the objects.
        names: Names of the predictions, one for each condition under which the video was tracked.
        within: Argument of ``visibility_flags``, in video frames.
    """

    def __init__(self, size: tuple[int, int], objects: Sequence[int], names: Sequence[str], within: int) -> None:
        self.size, self.objects, self.names, self.within = size, list(objects), (_TRUTH, *names), within
        self._frames: list[list[int]] = [[] for _ in objects]
        self._shares: list[list[float]] = [[] for _ in objects]
        self._masks: dict[tuple[int, str], list[UInt8[np.ndarray, " b"]]] = {
            (column, name): [] for column in range(len(objects)) for name in self.names
        }

    def add(
        self, column: int, frame: int, truth: Bool[np.ndarray, "h w"], predicted: Mapping[str, Bool[np.ndarray, "h w"]],
        visible_share: float | None = None,
    ) -> None:  # fmt: skip
        """Append a frame of an object. Frames of an object are added in ascending order.

        Args:
            column: Index of the object in ``objects``.
            frame: Frame number in the video.
            truth: True mask.
            predicted: Predicted mask by name.
            visible_share: Visible share of the object, 0..1, given for all frames of an object or for none.
        """
        self._frames[column].append(frame)
        if visible_share is not None:
            self._shares[column].append(visible_share)
        for name in self.names:
            self._masks[column, name].append(np.packbits(truth if name == _TRUTH else predicted[name]))

    def save(self, path: Path) -> None:
        """Write the file."""
        parts: dict[str, np.ndarray] = {}
        for column in range(len(self.objects)):
            parts[f"{column}/frames"] = np.array(self._frames[column], np.int64)
            parts[f"{column}/shares"] = np.array(self._shares[column], np.float64)
        for (column, name), packed in self._masks.items():
            parts[f"{column}/masks/{name}"] = np.stack(packed) if packed else np.zeros((0, 0), np.uint8)
        about = np.array([*self.size, self.within], np.int64)
        with writing(path) as file:
            np.savez_compressed(file, about=about, objects=np.array(self.objects, np.int64), **parts)


def load_objects(path: Path, name: str) -> Iterator[ObjectMasks]:
    """Load the objects' true masks, the prediction ``name`` and visibility flags, one object at a time."""
    with np.load(path) as stored:
        height, width, within = (int(number) for number in stored["about"])
        for column, number in enumerate(stored["objects"].tolist()):
            frames = stored[f"{column}/frames"].tolist()
            shape = (len(frames), height, width)
            truth, predicted = (_unpacked(stored[f"{column}/masks/{part}"], shape) for part in (_TRUTH, name))
            shares: Float[np.ndarray, " t"] = stored[f"{column}/shares"]
            flags = visibility_flags(truth, frames, within, shares if len(shares) else None)
            yield ObjectMasks(number, frames, truth, predicted, flags)


def _unpacked(packed: UInt8[np.ndarray, "t b"], shape: tuple[int, int, int]) -> Bool[np.ndarray, "t h w"]:
    frames, height, width = shape
    if not frames:
        return np.zeros(shape, bool)
    return np.unpackbits(packed, axis=1, count=height * width).view(bool).reshape(shape)
