"""Signals of teachers that run while the student trains: nothing is stored, and any view of an image will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from PIL import Image

from ..data import Geometry
from ..data.videos import VideoSource
from ..types import ImageBatch
from .base import Frame, Maps
from .sam3_detector import Sam3Detector


class Movable(Protocol):
    """A teacher as far as moving it goes."""

    fingerprint: str

    def to(self, device: torch.device | str) -> Any: ...


class RunningMaps:
    """``Signals`` of images from a network that is asked at every step.

    Example:
        >>> RunningMaps(detector, detector.features).answer(images, ())  # doctest: +SKIP
    """

    def __init__(self, teacher: Movable, ask: Callable[[ImageBatch], Maps]) -> None:
        """ask: a method of ``teacher``, frozen and in eval mode, that gives float32 maps without gradient."""
        self.teacher, self.ask, self.fingerprint = teacher, ask, teacher.fingerprint

    def read(self, asked: ImageBatch) -> Maps:
        """Nothing: all that the teacher needs are the images."""
        return ()

    def answer(self, asked: ImageBatch, read: Maps) -> Maps:
        return self.ask(asked)

    def __getstate__(self) -> dict[str, object]:
        """A loader's worker never asks: the network is not sent to it."""
        return self.__dict__ | {"teacher": None, "ask": None}

    def to(self, device: torch.device | str) -> None:
        self.teacher.to(device)


class RunningFrames:
    """``Signals`` of frames of videos: one level of a detector's pyramid.

    A loader's worker decodes the frames, which no batch holds at the teacher's size; the detector runs on the device.
    """

    def __init__(
        self, teacher: Sam3Detector, source: VideoSource, place: Geometry, level: int, batch_size: int = 4
    ) -> None:
        """place: how frames are laid on the teacher's canvas. batch_size: frames that are asked about at once."""
        self.teacher, self.source, self.place = teacher, source, place
        self.level, self.batch_size, self.fingerprint = level, batch_size, teacher.fingerprint

    def read(self, asked: Sequence[Frame]) -> Maps:
        """The canvases (n, 3, s, s), uint8. Raises ``BadVideo`` where a frame cannot be decoded."""
        canvases = [
            self.place.canvas(Image.fromarray(pixels))[0]
            for key, frames in groupby(asked, key=lambda frame: frame[0])
            for pixels in self.source.frames(key, [number for _, number in frames])
        ]
        return (torch.stack(canvases),) if canvases else ()

    def __getstate__(self) -> dict[str, object]:
        """A loader's worker decodes alone: the network is not sent to it."""
        return self.__dict__ | {"teacher": None}

    def answer(self, asked: Sequence[Frame], read: Maps) -> Maps:
        """One map of each frame, on the device of the teacher."""
        blocks = [block for canvases in read for block in canvases.split(self.batch_size)]
        levels = [self.teacher.pyramid(ImageBatch.full(block))[self.level] for block in blocks]
        return (torch.cat(levels),) if levels else ()

    def to(self, device: torch.device | str) -> None:
        self.teacher.to(device)
