"""Evaluation of the student before and after training, and of its main teacher, on held-out images."""

from __future__ import annotations

import torch
from rich.console import Console

from ...checkpoints.promptable import load_promptable
from ...dist import default_device
from ...evaluation import EvaluationResult, evaluate_models
from ...inference.prompting import KINDS
from ...ops.promptable import Promptable, image_size
from ...progress import Progress
from ..base import DISTILLED, TEACHER
from .config import PromptRunConfig
from .parts import PromptParts
from .task import PromptTask

console = Console(soft_wrap=True, highlight=False)
UNTUNED = "untuned"
"""Row of the student before training."""


def evaluate(config: PromptRunConfig) -> EvaluationResult:
    """Evaluate the teacher with the largest weight and the student before and after training on held-out images.

    A teacher with another image size is left out, because it cannot use the same canvas.
    """
    parts, settings = PromptParts(config), config.evaluate
    torch.manual_seed(config.train.seed)  # same seed as in training, without any step
    task = PromptTask(config, None, parts.objects)
    models: dict[str, Promptable] = {
        UNTUNED: task.export(task.build_student()), DISTILLED: load_promptable(config.output),
    }  # fmt: skip
    if config.distilled:
        entry = max(config.teachers, key=lambda teacher: teacher.weight)
        teacher = load_promptable(entry.checkpoint, entry.image_size)
        if image_size(teacher) == parts.image_size:
            models = {TEACHER: teacher, **models}
        else:
            console.print(f"         without the teacher {entry.name}: it reads images of {image_size(teacher)} px")
    source = parts.held_out_source()
    total = len(source.keys) if settings.images is None else min(settings.images, len(source.keys))
    kinds = tuple(kind for kind in KINDS if kind in settings.prompts)
    with Progress("evaluating", total, "images") as bar:
        return evaluate_models(
            models, source, parts.geometry, teacher=TEACHER if TEACHER in models else None, prompts=kinds,
            images=settings.images, batch_size=settings.batch_size, device=default_device(), progress=bar.advance,
        )  # fmt: skip
