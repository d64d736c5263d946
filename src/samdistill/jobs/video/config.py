"""Configuration of the video job."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from ...config.parts import (
    CacheConfig,
    CachedRun,
    Count,
    Fraction,
    Positive,
    Strict,
    TeacherConfig,
    TrainConfig,
    loss_block,
)
from .losses import ALIGN_TERMS, MEMORY_TERMS


class MemoryConfig(Strict):
    """What the student remembers with, between its DETR encoder and its decoders."""

    latents: Positive = 64
    """Tokens that the past is kept in, however many frames it has."""
    layers: Positive = 2
    windows: Count = 0
    """Side of a grid of latents that look at one window each, beside the global ones; 0 makes all of them global."""
    level: Literal[2, 3] = 3
    """The pyramid level that is remembered: 3 of stride 28 in the teacher and 32 in the student, 2 of half of that."""
    marks: bool = True
    """Remember where the object that is asked about was, and ask about one object at a time. False: remember the
    features alone, and ask about all objects of a phrase together, as described."""

    @model_validator(mode="after")
    def _some_look_everywhere(self) -> MemoryConfig:
        if self.windows**2 >= self.latents:
            count = f"{self.windows**2} windows leave none of {self.latents} latents to look everywhere"
            raise ValueError(f"windows={self.windows}: {count}")
        return self


class VideoStudentConfig(Strict):
    start: Path | None = None
    """A finished run of the detection job, or its ``student/``, or ``sandbox-student``; None takes the newest one below
    ``runs``."""
    runs: Path = Path("runs")
    memory: MemoryConfig = MemoryConfig()


class ClipsConfig(Strict):
    """How clips are cut from videos, and what is asked of them."""

    context: Positive = 8
    """Annotated frames before the query at most."""
    shortest: Positive | None = 1
    """The fewest a clip of a long enough video may have, as at the beginning of a stream; None: ``context``."""
    objects: Positive = 20
    """The most in a clip."""
    per_video: Positive = 1
    """Clips of each video in an epoch."""
    own: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Share of the context frames that are remembered by the student's own features instead of the teacher's, in the
    first and in the last epoch that trains the memory; linear between."""
    lost: Fraction = 0.0
    """Share of the context frames in which an object's mark is left out, as where the student did not find it."""
    phrase: str = "object"
    """What an object without a name is called."""

    @model_validator(mode="after")
    def _shortest_fits(self) -> ClipsConfig:
        if self.shortest is not None and self.shortest > self.context:
            raise ValueError(f"shortest={self.shortest} is more than context={self.context}")
        return self


VideoLossConfig = loss_block(
    "VideoLossConfig",
    "Weights of the terms, as described but for ``select`` and ``align``.",
    (ALIGN_TERMS, MEMORY_TERMS),
)


class VideoEvaluateConfig(Strict):
    convention: Literal["davis2017", "sav"] = "sav"
    """Which frames count."""
    videos: Positive | None = None
    """At most this many held-out videos are followed from end to end; None takes all."""


class VideoRunConfig(CachedRun):
    """One run of video distillation: everything needed to repeat it. Written resolved into the run folder."""

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
