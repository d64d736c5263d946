"""Merging of a trained trunk, and evaluation of the merged model on held-out images."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from transformers import Sam3Model

from ...checkpoints.files import TORCH_SUFFIXES
from ...checkpoints.merge import merge
from ...checkpoints.promptable import load_model
from ...checkpoints.report import MergeReport
from ...dist import default_device
from ...evaluation import EvaluationResult, evaluate_models
from ...ops.promptable import Promptable
from ...progress import Progress
from ...students import build_trunk, host_trunk
from ...teachers import TEACHERS
from ..base import DISTILLED, TEACHER, UNTRAINED
from .config import EncoderRunConfig
from .parts import EncoderParts
from .task import trunk_config

console = Console(soft_wrap=True, highlight=False)


def merge_student(config: EncoderRunConfig) -> MergeReport | None:
    """Merge the trained trunk into its teacher. An original ``sam3.pt`` gives a file, any other teacher a folder.

    None if the teacher is of a kind without checkpoints that can host a trunk.
    """
    if not TEACHERS.get(config.teacher.kind).model_types:
        console.print(f"[bold]merge[/]   left out: a {config.teacher.kind} teacher has no place for the trunk")
        return None
    out, suffix = config.output, Path(config.teacher.path).suffix
    original = config.teacher.kind == "sam3" and suffix in TORCH_SUFFIXES
    target = out / (f"merged{suffix}" if original else "merged")
    return merge(out, config.teacher.path, target)


def evaluate(config: EncoderRunConfig, merged: MergeReport | None) -> EvaluationResult | None:
    """Evaluate teacher, untrained and distilled student on held-out images. None if no host model can be built."""
    if merged is None or merged.layout != "transformers":
        console.print("[bold]evaluate[/] left out: only a transformers folder can be run")
        return None
    parts = EncoderParts(config)
    models = {
        TEACHER: load_model(config.teacher.path, parts.teacher_info.image_size),
        UNTRAINED: _untrained(parts),
        DISTILLED: load_model(merged.out),
    }
    source = parts.held_out_source()
    settings = config.evaluate
    total = len(source.keys) if settings.images is None else min(settings.images, len(source.keys))
    with Progress("evaluating", total, "images") as bar:
        return evaluate_models(
            models, source, parts.geometry, teacher=TEACHER, prompts=settings.prompts, images=settings.images,
            batch_size=settings.batch_size, device=default_device(), progress=bar.advance,
        )  # fmt: skip


def _untrained(parts: EncoderParts) -> Promptable | Sam3Model:
    """Return the teacher's heads on the untrained student, built with the seed of the run."""
    host = load_model(parts.config.teacher.path, parts.teacher_info.image_size)
    torch.manual_seed(parts.config.train.seed)
    trunk = build_trunk(trunk_config(parts.config.student, parts.teacher_info), parts.config.student.pretrained)
    return host_trunk(host, trunk.eval())
