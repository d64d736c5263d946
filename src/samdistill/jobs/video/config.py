"""Configuration of the video job."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from ...config.losses import loss_block
from ...config.parts import (
    CacheConfig,
    CachedRun,
    Count,
    Fraction,
    Positive,
    Strict,
    TeacherConfig,
    TrainConfig,
)
from .losses import ALIGN_TERMS, MEMORY_TERMS


class MemoryConfig(Strict):
    """The student's memory, between its DETR encoder and its decoders."""

    latents: Positive = 64
    """Number of tokens that represent the past, for any number of frames."""
    layers: Positive = 2
    windows: Count = 0
    """Side of a grid of latents that attend to one window each. The other latents are global. 0 for global latents
    only.
    """
    level: Literal[2, 3] = 3
    """FPN level in the memory: 3 with stride 28 in the teacher and 32 in the student, or 2 with half of these strides.
    """
    marks: bool = True
    """Store the position of the object in the memory, and ask about one object at a time. False: store features only,
    and ask about all objects of a phrase together, as in the description.
    """

    @model_validator(mode="after")
    def _some_look_everywhere(self) -> MemoryConfig:
        if self.windows**2 >= self.latents:
            count = f"{self.windows**2} windows leave none of {self.latents} latents to look everywhere"
            raise ValueError(f"windows={self.windows}: {count}")
        return self


class VideoStudentConfig(Strict):
    """The image student that gets a memory."""

    start: Path | None = None
    """Finished run of the detection job, its ``student/``, or ``sandbox-student``. None for the newest one below
    ``runs``.
    """
    runs: Path = Path("runs")
    memory: MemoryConfig = MemoryConfig()


class ClipsConfig(Strict):
    """Clips of videos, and the questions about them."""

    context: Positive = 8
    """Largest number of annotated frames before the query frame."""
    shortest: Positive | None = 1
    """Smallest number of context frames if the video is long enough, as at the beginning of a stream. None for
    ``context``.
    """
    objects: Positive = 20
    """Largest number of objects in a clip."""
    per_video: Positive = 1
    """Clips per video and epoch."""
    own: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Fraction of context frames that enter the memory with the student's features instead of the teacher's, in the
    first and in the last epoch that trains the memory; linear between them.
    """
    lost: Fraction = 0.0
    """Fraction of context frames in which the mark of an object is removed, as if the student had not found it."""
    phrase: str = "object"
    """Phrase for objects without a name."""

    @model_validator(mode="after")
    def _shortest_fits(self) -> ClipsConfig:
        if self.shortest is not None and self.shortest > self.context:
            raise ValueError(f"shortest={self.shortest} is more than context={self.context}")
        return self


VideoLossConfig = loss_block(
    "VideoLossConfig",
    "Weights of the terms, as described, except for ``select`` and ``align``.",
    (ALIGN_TERMS, MEMORY_TERMS),
)


class VideoEvaluateConfig(Strict):
    """Evaluation on held-out videos."""

    convention: Literal["davis2017", "sav"] = "sav"
    """Frames that count."""
    videos: Positive | None = None
    """Largest number of held-out videos that are followed from beginning to end. None for all."""


class VideoRunConfig(CachedRun):
    """Configuration of a video run. The resolved configuration is saved in the run folder."""

    job: Literal["video"] = "video"
    output: Path = Path("runs/video")
    teacher: TeacherConfig
    student: VideoStudentConfig = VideoStudentConfig()
    clips: ClipsConfig = ClipsConfig()
    cache: CacheConfig = CacheConfig()
    loss: VideoLossConfig = VideoLossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: VideoEvaluateConfig = VideoEvaluateConfig()

    @model_validator(mode="after")
    def _data_fits_videos(self) -> VideoRunConfig:
        if self.data.views != 1:
            raise ValueError("data.views: a video is cached once, as it is; leave it at 1")
        if self.data.held_out_last is not None:
            raise ValueError("data.held_out_last: videos are divided by folder or by data.held_out_fraction")
        return self
