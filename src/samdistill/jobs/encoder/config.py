"""Configuration of the encoder job."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from ...config.losses import loss_block
from ...config.parts import (
    CacheConfig,
    CachedRun,
    EvaluateConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from .losses import FEATURE_LOSSES

EncoderLossConfig = loss_block("EncoderLossConfig", "Weights of the terms of encoder distillation.", (FEATURE_LOSSES,))


class EncoderRunConfig(CachedRun):
    """Configuration of an encoder run. The resolved configuration is saved in the run folder."""

    FOLDER: ClassVar[str] = "embeddings"
    job: Literal["encoder"] = "encoder"
    output: Path = Path("runs/encoder")
    teacher: TeacherConfig
    student: StudentConfig
    cache: CacheConfig = CacheConfig()
    loss: EncoderLossConfig = EncoderLossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
