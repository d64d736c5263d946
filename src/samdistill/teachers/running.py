"""Signals of teachers that run during training. Nothing is stored, so any view of an image can be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Generic, Protocol, TypeVar

import torch
from PIL import Image

from ..data import Geometry
from ..data.videos import VideoSource
from ..types import ImageBatch
from .base import Frame, Maps
from .sam3_detector import Sam3Detector


class Movable(Protocol):
    """A teacher that can be moved to a device."""

    fingerprint: str

    def to(self, device: torch.device | str) -> Any: ...


Asked = TypeVar("Asked")


class RunningMaps(Generic[Asked]):
    """``Signals`` of images or phrases from a network that runs in every step.

    Example:
        >>> RunningMaps(detector, detector.features).answer(images, ())  # doctest: +SKIP
    """

    def __init__(self, teacher: Movable, ask: Callable[[Asked], Maps]) -> None:
        """Set up the signals.

        Args:
            teacher: The teacher, frozen and in eval mode.
            ask: A method of ``teacher`` that returns float32 maps without gradient.
        """
        self.teacher, self.ask, self.fingerprint = teacher, ask, teacher.fingerprint

    def read(self, asked: Asked) -> Maps:
        """Return nothing, because the teacher needs the request only."""
        return ()

    def answer(self, asked: Asked, read: Maps) -> Maps:
        return self.ask(asked)

    def __getstate__(self) -> dict[str, object]:
        """Leave out the network, because loader workers do not run it."""
        return self.__dict__ | {"teacher": None, "ask": None}

    def to(self, device: torch.device | str) -> None:
        self.teacher.to(device)


class RunningFrames:
    """``Signals`` of video frames: one FPN level of a detector.

    Loader workers decode the frames at the teacher's size, which are not in the batch. The detector runs on the device.
    """

    def __init__(
        self, teacher: Sam3Detector, source: VideoSource, place: Geometry, level: int, batch_size: int = 4
    ) -> None:
        """Set up the signals.

        Args:
            teacher: The detector.
            source: The videos.
            place: Geometry of frames on the teacher's canvas.
            level: Index of the FPN level, from the finest.
            batch_size: Frames per forward pass.
        """
        self.teacher, self.source, self.place = teacher, source, place
        self.level, self.batch_size, self.fingerprint = level, batch_size, teacher.fingerprint

    def read(self, asked: Sequence[Frame]) -> Maps:
        """Decode the frames and return their canvases (n, 3, s, s), uint8.

        Raises:
            BadVideo: A frame cannot be decoded.
        """
        canvases = [
            self.place.canvas(Image.fromarray(pixels))[0]
            for key, frames in groupby(asked, key=lambda frame: frame[0])
            for pixels in self.source.frames(key, [number for _, number in frames])
        ]
        return (torch.stack(canvases),) if canvases else ()

    def __getstate__(self) -> dict[str, object]:
        """Leave out the network, because loader workers only decode."""
        return self.__dict__ | {"teacher": None}

    def answer(self, asked: Sequence[Frame], read: Maps) -> Maps:
        """Return one map per frame, on the teacher's device."""
        blocks = [block for canvases in read for block in canvases.split(self.batch_size)]
        levels = [self.teacher.pyramid(ImageBatch.full(block))[self.level] for block in blocks]
        return (torch.cat(levels),) if levels else ()

    def to(self, device: torch.device | str) -> None:
        self.teacher.to(device)
