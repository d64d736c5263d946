"""Plan of a video run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...data import BadInput, leave_out
from ...data.sources import evenly
from ...data.videos import BadVideo, VideoSource
from ...engine.frozen_norm import batch_norms
from ...report import human_bytes
from ...store import record_bytes
from ...students import MEMORY, VIDEO_DETECTORS
from ...types import UserError
from ..base import Plan, optimiser_bytes, teacher_bytes
from ..caching import planned
from .parts import VideoParts

COUNTED = 16
"""Number of videos whose annotation is read to estimate the number of frames."""


@dataclass(frozen=True, kw_only=True)
class VideoPlan(Plan):
    """Plan of a video run. Sizes are in bytes.

    Attributes:
        student_params: Parameters of the whole student.
        parts: Trained parameters by module.
        frames: Annotated frames of all training videos, extrapolated from ``counted`` videos.
        counted: Number of videos whose frames were counted.
        online: The teacher runs during training, without a cache.
        frozen_bytes: Frozen weights of the student.
        teacher_bytes: Weights of a running teacher, or 0.
    """

    teacher: str
    teacher_params: int
    image_size: int
    record_shape: tuple[int, int, int]
    student: str
    student_params: int
    parts: dict[str, int]
    videos: int
    held_out_videos: int
    frames: int
    counted: int
    clips_per_epoch: int
    context: int
    objects: int
    online: bool
    bytes_per_frame: int
    cache_bytes: int
    phases: tuple[tuple[str, int], ...]
    weights_and_optimiser_bytes: int
    frozen_bytes: int
    teacher_bytes: int

    @property
    def trained_on(self) -> str:
        return f"{self.clips_per_epoch} clips"

    @property
    def inputs(self) -> int:
        return self.videos

    @property
    def headline(self) -> str:
        return (
            f"{sum(self.parts.values()) / 1e6:.2f}M parameters to train in a student of "
            f"{self.student_params / 1e6:.2f}M; {self.videos} videos, {human_bytes(self.cache_bytes)} of cache, "
            f"{self.steps} steps"
        )

    @property
    def raw_record_bytes(self) -> int:
        return record_bytes("fp16", self.record_shape)

    def facts(self) -> dict[str, str]:
        shape = " x ".join(map(str, self.record_shape))
        parts = ", ".join(f"{name} {size / 1e6:.2f}M" for name, size in self.parts.items())
        phases = "; ".join(f"{name} {steps}" for name, steps in self.phases)
        teacher = f", {human_bytes(self.teacher_bytes)} teacher" if self.teacher_bytes else ""
        about = "" if self.counted == self.videos else f", counted in {self.counted} videos"
        return {
            "teacher": f"{self.teacher} ({self.teacher_params / 1e6:.2f}M), {self.image_size} px, {shape} a frame",
            "student": f"{self.student} ({self.student_params / 1e6:.2f}M); what trains: {parts}",
            "videos": f"{self.videos} to train on, {self.held_out_videos} held out; {self.frames} annotated "
            f"frames{about}",
            "clips": f"{self.clips_per_epoch} an epoch, {self.context} frames before the query and {self.objects} "
            "objects at most",
            "cache": planned(self.online, self.cache_bytes, f"{human_bytes(self.bytes_per_frame)} a frame"),
            "memory": f"{human_bytes(self.weights_and_optimiser_bytes)} trained weights and optimiser, "
            f"{human_bytes(self.frozen_bytes)} frozen{teacher}; activations are not counted",
            "steps": f"{self.steps} ({self.steps_per_epoch} an epoch)" + (f": {phases}" if phases else ""),
        }


def plan_video(parts: VideoParts) -> VideoPlan:
    """Return the plan of a video run.

    It reads configs and some annotations, without loading weights. At most the first frame of a video is decoded.
    """
    config, info, train = parts.config, parts.teacher_info, parts.config.train
    memory, outline = config.student.memory, parts.image_student_config
    outline.memory_latents, outline.memory_layers, outline.memory_windows = (
        memory.latents,
        memory.layers,
        memory.windows,
    )
    with torch.device("meta"):
        student = VIDEO_DETECTORS[outline.model_type](outline)
    trains = nn.ModuleDict({name.rstrip("."): getattr(student, name.rstrip(".")) for name in MEMORY})
    if parts.aligns:
        trains["memory_level"] = student.get_submodule(student.coarsest)
    sizes = {name: _count(module) for name, module in trains.items()}
    keys = parts.train_source.keys
    counts = _annotated(parts.train_source, evenly(keys, COUNTED))
    frames = round(sum(counts) / len(counts) * len(keys))
    clips = len(keys) * config.clips.per_video
    per_epoch, per_frame = clips // train.batch_size, record_bytes(config.cache.codec, parts.shape)
    trained, whole = sum(sizes.values()), _count(student)
    return VideoPlan(
        teacher=config.teacher.path, teacher_params=info.params, image_size=info.image_size, record_shape=parts.shape,
        student=str(parts.start), student_params=whole, parts=sizes,
        videos=len(keys), held_out_videos=len(parts.held_out_source.keys), frames=frames, counted=len(counts),
        clips_per_epoch=clips, context=config.clips.context, objects=config.clips.objects, bytes_per_frame=per_frame,
        online=config.online, cache_bytes=per_frame * frames if parts.reads_teacher and not config.online else 0,
        teacher_bytes=teacher_bytes(config.teacher, info.params) if parts.reads_teacher and config.online else 0,
        phases=tuple((phase.name, phase.epochs * per_epoch) for phase in train.phases or ()),
        weights_and_optimiser_bytes=optimiser_bytes(trains, train), frozen_bytes=4 * (whole - trained),
        batch_norms=batch_norms(trains), steps_per_epoch=per_epoch, steps=per_epoch * train.total_epochs,
    )  # fmt: skip


def _annotated(source: VideoSource, keys: Sequence[str]) -> list[int]:
    """Return the number of annotated frames of each readable video.

    Raises:
        UserError: No video is readable.
    """
    counts, bad = list[int](), list[BadInput]()
    for key in keys:
        try:
            record = source.record(key)
            counts.append(len(record.annotated))
            leave_out(record.problems)
        except BadVideo as error:
            bad.append(error.bad)
    leave_out(bad)
    if not counts:
        raise UserError(f"none of {len(keys)} videos can be used, first {bad[0].key}: {bad[0].reason}")
    return counts


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
