"""Plan of a prompt run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...checkpoints.promptable import load_promptable
from ...data.sources import survey
from ...ops.promptable import decoder_width, embedding_grid, image_size, trunk_channels
from ...report import human_bytes
from ...store import record_bytes
from ...teachers.stored_signals import record_shapes
from ..base import Plan, optimiser_bytes
from .config import PromptRunConfig
from .parts import PATCH_CHANNELS, PromptParts, _parts
from .student import PromptStudent


@dataclass(frozen=True)
class PlannedTeacher:
    """Description of a teacher.

    Attributes:
        name: Name of the entry.
        checkpoint: Path or hub id.
        share: Weight divided by the sum of weights.
        params: Number of parameters.
        image_size: Side of the input in pixels.
        grid: Rows and columns of the image embedding.
        patch_channels: Channels of its patch features.
        bytes_per_image: Bytes of its cached features of one view.
    """

    name: str
    checkpoint: str
    share: float
    params: int
    image_size: int
    grid: tuple[int, int]
    patch_channels: int
    bytes_per_image: int


@dataclass(frozen=True, kw_only=True)
class PromptPlan(Plan):
    """Plan of a prompt run. Sizes are in bytes.

    Attributes:
        parts: Parameters of the student by module.
        cached: The run reads the cache.
        views: Number of cached views per image.
        bytes_per_image: Bytes of one view in the cache.
        cache_bytes: Bytes of the cache. It is computed also if the run does not read it.
    """

    student: str
    student_params: int
    parts: dict[str, int]
    image_size: int
    grid: tuple[int, int]
    student_fp16_bytes: int
    teachers: tuple[PlannedTeacher, ...]
    terms: tuple[str, ...]
    images: int
    held_out_images: int
    objects: int
    mode: str
    rounds: int
    cached: bool
    views: int
    codec: str
    bytes_per_image: int
    cache_bytes: int
    weights_and_optimiser_bytes: int
    teacher_bytes: int

    @property
    def inputs(self) -> int:
        return self.images

    @property
    def headline(self) -> str:
        teachers = ", ".join(f"{teacher.name} {teacher.params / 1e6:.2f}M" for teacher in self.teachers) or "none"
        return (
            f"{self.student}: {self.student_params / 1e6:.2f}M parameters, teachers: {teachers}; {self.images} images "
            f"with {self.objects} objects each, {self.steps} steps"
        )

    def facts(self) -> dict[str, str]:
        parts = ", ".join(f"{name} {size / 1e6:.2f}M" for name, size in self.parts.items() if size >= 5e3)
        grid = " x ".join(map(str, self.grid))
        rounds = f" and {self.rounds} corrective click(s) each" if self.rounds else ""
        teachers = {
            f"teacher {t.name}": f"{t.checkpoint}, {t.share:.0%}: {t.params / 1e6:.2f}M, {t.image_size} px, "
            f"{' x '.join(map(str, t.grid))} cells"
            for t in self.teachers
        }
        used = f"{self.views} view(s) each" if self.cached else "not used: the teachers run during training"
        return {
            "student": f"{self.student} ({self.student_params / 1e6:.2f}M): {parts}; {self.image_size} px, {grid} "
            "cells",
            **teachers,
            "distilled": ", ".join(self.terms) or "nothing: only the task is trained",
            "images": f"{self.images} to train on, {self.held_out_images} held out; {self.objects} object(s) a step, "
            f"prompts: {self.mode}{rounds}",
            "cache": f"{human_bytes(self.cache_bytes)}: {self.codec}, {human_bytes(self.bytes_per_image)} a view, "
            f"{used}",
            "memory": f"{human_bytes(self.weights_and_optimiser_bytes)} weights and optimiser, "
            f"{human_bytes(self.teacher_bytes)} teachers; activations are not counted",
            "student's file": f"{human_bytes(self.student_fp16_bytes)} in fp16",
            "steps": f"{self.steps} ({self.steps_per_epoch} an epoch)",
        }


def plan_prompt(config: PromptRunConfig) -> PromptPlan:
    """Return the plan of a prompt run. No image is decoded."""
    parts, train = PromptParts(config), config.train
    student, teachers = parts.student, tuple(_planned(parts))
    params, images = sum(student.parts.values()), len(survey(parts.train_source).keys)
    per_image = sum(teacher.bytes_per_image for teacher in teachers)
    per_epoch = images // train.batch_size
    return PromptPlan(
        student=student.name, student_params=params, parts=student.parts, image_size=student.image_size,
        grid=student.grid, student_fp16_bytes=2 * params,
        teachers=teachers, terms=config.distilled, images=images,
        held_out_images=len(survey(parts.held_out_source()).keys),
        objects=config.prompts.objects, mode=config.prompts.mode, rounds=config.prompts.rounds, cached=config.cached,
        views=config.data.views, codec=config.cache.codec, bytes_per_image=per_image,
        cache_bytes=per_image * images * config.data.views,
        weights_and_optimiser_bytes=_optimiser_bytes(parts, teachers),
        teacher_bytes=0 if config.cached else 4 * sum(teacher.params for teacher in teachers),
        batch_norms=student.batch_norms, steps_per_epoch=per_epoch, steps=per_epoch * train.total_epochs,
    )  # fmt: skip


def _optimiser_bytes(parts: PromptParts, teachers: Sequence[PlannedTeacher]) -> int:
    """Return the bytes of the student in training, with its convolutions for the teachers' patch features."""
    outline = parts.student.outline
    channels = [one.patch_channels for one in teachers] if "encoder_patch" in parts.config.distilled else []
    with torch.device("meta"):
        return optimiser_bytes(PromptStudent(outline, trunk_channels(outline), channels), parts.config.train)


def _planned(parts: PromptParts) -> Iterator[PlannedTeacher]:
    config = parts.config
    for entry in config.teachers if config.distilled else ():
        if entry.name not in parts.weights:
            continue
        model = load_promptable(entry.checkpoint, entry.image_size)
        grid, channels = embedding_grid(model), min(PATCH_CHANNELS, trunk_channels(model))
        shapes = record_shapes(channels, decoder_width(model), grid, config.prompts.objects, config.cache.dense)
        per_image = sum(record_bytes(config.cache.codec, shape) for shape in shapes.values())
        share, size = parts.weights[entry.name], image_size(model)
        params = sum(_parts(model).values())
        yield PlannedTeacher(entry.name, entry.checkpoint, share, params, size, grid, channels, per_image)
