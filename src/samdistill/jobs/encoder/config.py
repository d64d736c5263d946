"""Configuration of the encoder job."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ...config.parts import CacheConfig, EvaluateConfig, Run, StudentConfig, TeacherConfig, TrainConfig, loss_block
from .losses import FEATURE_LOSSES

EncoderLossConfig = loss_block("EncoderLossConfig", "Weights of the terms of encoder distillation.", (FEATURE_LOSSES,))


class EncoderRunConfig(Run):
    """One run of encoder distillation: everything needed to repeat it. Written resolved into the run folder."""

    job: Literal["encoder"] = "encoder"
    output: Path = Path("runs/encoder")
    teacher: TeacherConfig
    student: StudentConfig
    cache: CacheConfig = CacheConfig()
    loss: EncoderLossConfig = EncoderLossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def store_root(self) -> Path:
        return self.cache.root if self.cache.root is not None else self.output / "embeddings"
