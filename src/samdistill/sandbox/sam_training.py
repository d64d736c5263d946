"""``samdistill sandbox train-teacher sam`` and ``mobile``."""

from __future__ import annotations

from pathlib import Path

from transformers import SamModel

from ..students.promptable import MobileSamModel
from .sam import build_mobile, build_sam
from .training import Recipe, TrainedTeacher, train_promptable

SAM = Recipe("sam", SamModel, build_sam, prompts_per_image=2, multimask=True)
MOBILE = Recipe("mobile", MobileSamModel, build_mobile, prompts_per_image=2, multimask=True)


def train_sam(out: Path, steps: int, batch_size: int, lr: float, weights: Path | None) -> TrainedTeacher:
    """``train_promptable`` of the tiny SAM."""
    return train_promptable(SAM, out, steps, batch_size, lr, weights)


def train_mobile(out: Path, steps: int, batch_size: int, lr: float, weights: Path | None) -> TrainedTeacher:
    """``train_promptable`` of the tiny MobileSAM."""
    return train_promptable(MOBILE, out, steps, batch_size, lr, weights)
