"""From a video run's parts to its task and its plan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ..data import BadInput, leave_out
from ..data.videos import BadVideo, VideoSource
from ..engine.frozen_norm import batch_norms
from ..evaluation.examples import evenly
from ..store import record_bytes
from ..students import EfficientSam3Model
from ..students.sam3 import MEMORY
from ..tasks.video import VideoTask
from ..tasks.video_student import COARSEST
from ..teachers import CachedLevels
from ..types import UserError
from .video import VideoAssembly
from .video_cache import complete_videos, open_levels, prove

COUNTED = 16
"""Videos whose annotation is read to say how many frames one has."""


def video_task(parts: VideoAssembly, prove_teacher: bool = True) -> VideoTask:
    """The job on all its videos: those that are wholly cached, where the teacher's maps are read at all.

    prove_teacher: rank 0 opens the teacher and holds it against the cache.
    """
    _ = parts.student_config  # a student of another width is refused before the cache is looked for
    levels, keys = None, parts.train_source.keys
    if parts.reads_teacher:
        store = open_levels(parts)
        if prove_teacher and int(os.environ.get("RANK", 0)) == 0:
            prove(parts, store)
        keys, skipped = complete_videos(parts, store)
        leave_out(skipped, seen_by_all=True)
        levels = CachedLevels(store)
    held_out = parts.held_out_source
    return VideoTask(parts.config, parts.start, parts.words, parts.view, parts.train_source, keys, levels, held_out)


@dataclass(frozen=True)
class VideoPlan:
    """Sizes in bytes. parts: parameters of what trains, by module; batch_norms: layers among it; student_params: of
    the whole student.

    frames: annotated frames of all training videos, counted in ``counted`` of them and extrapolated.
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
    bytes_per_frame: int
    cache_bytes: int
    phases: tuple[tuple[str, int], ...]
    weights_and_optimiser_bytes: int
    frozen_bytes: int
    batch_norms: int
    steps_per_epoch: int
    steps: int
    skipped: tuple[BadInput, ...] = ()
    """Inputs that the run will leave out."""

    @property
    def trained_on(self) -> str:
        return f"{self.clips_per_epoch} clips"

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"skipped": [bad._asdict() for bad in self.skipped]}


def plan_video(parts: VideoAssembly) -> VideoPlan:
    """What a run will need; reads configs and some annotations, loads no weights and decodes no frame but the first."""
    config, info, train = parts.config, parts.teacher_info, parts.config.train
    memory, outline = config.student.memory, parts.student_config
    outline.memory_latents, outline.memory_layers, outline.memory_windows = (
        memory.latents,
        memory.layers,
        memory.windows,
    )
    with torch.device("meta"):
        student = EfficientSam3Model(outline)
    sizes = {name: _count(getattr(student, name.rstrip("."))) for name in MEMORY}
    norms = 0
    if parts.aligns:
        level = student.vision_encoder.adapters[COARSEST].smooth
        sizes["memory_level"], norms = _count(level), batch_norms(level)
    keys = parts.train_source.keys
    counts = _annotated(parts.train_source, evenly(keys, COUNTED))
    frames = round(sum(counts) / len(counts) * len(keys))
    clips = len(keys) * config.clips.per_video
    per_epoch, per_frame = clips // train.batch_size, record_bytes(config.cache.codec, parts.shape)
    trained, whole = sum(sizes.values()), _count(student)
    return VideoPlan(
        teacher=config.teacher.path, teacher_params=info.params, image_size=info.image_size, record_shape=parts.shape,
        student=str(parts.start), student_params=whole, parts={n.rstrip("."): size for n, size in sizes.items()},
        videos=len(keys), held_out_videos=len(parts.held_out_source.keys), frames=frames, counted=len(counts),
        clips_per_epoch=clips, context=config.clips.context, objects=config.clips.objects, bytes_per_frame=per_frame,
        cache_bytes=per_frame * frames if parts.reads_teacher else 0,
        phases=tuple((phase.name, phase.epochs * per_epoch) for phase in train.phases or ()),
        weights_and_optimiser_bytes=16 * trained, frozen_bytes=4 * (whole - trained), batch_norms=norms,
        steps_per_epoch=per_epoch, steps=per_epoch * train.total_epochs,
    )  # fmt: skip


def _annotated(source: VideoSource, keys: Sequence[str]) -> list[int]:
    """Annotated frames of each video that can be read. Raises ``UserError`` where none can."""
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


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
