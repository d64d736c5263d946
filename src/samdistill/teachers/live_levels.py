"""One pyramid level of the frames of videos, computed by the detector: for videos without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..data import Geometry
from ..data.videos import VideoSource
from ..types import ImageBatch
from .sam3_detector import Sam3Detector


class LiveLevels:
    """What a cache of the same teacher would hold, computed anew at every call."""

    def __init__(
        self, teacher: Sam3Detector, source: VideoSource, place: Geometry, level: int, batch_size: int = 4
    ) -> None:
        """place: how frames are laid on the teacher's canvas. batch_size: frames that are asked about at once."""
        self.teacher, self.source, self.place = teacher, source, place
        self.level, self.batch_size = level, batch_size

    def read(self, key: str, frames: Sequence[int]) -> Float[Tensor, "t c h w"]:
        """The maps of some frames of a video in the order of ``frames``, in float32 on the CPU.

        Raises ``BadVideo`` where one cannot be decoded.
        """
        canvases = [self.place.canvas(Image.fromarray(pixels))[0] for pixels in self.source.frames(key, frames)]
        blocks = torch.stack(canvases).split(self.batch_size)
        return torch.cat([self.teacher.pyramid(ImageBatch.full(block))[self.level].cpu() for block in blocks])
