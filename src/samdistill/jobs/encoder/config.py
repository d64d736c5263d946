"""Configuration of the encoder job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ...config.parts import CacheConfig, EvaluateConfig, Run, Strict, StudentConfig, TeacherConfig, TrainConfig


class EncoderLossConfig(Strict):
    """Weights of the two terms of encoder distillation."""

    mse: Annotated[float, Field(ge=0)] = 1.0
    cosine: Annotated[float, Field(ge=0)] = 1.0


class EncoderRunConfig(Run):
    """One run of encoder distillation: everything needed to repeat it. Written resolved into the run folder."""

    TERMS: ClassVar[tuple[str, ...]] = ("mse", "cosine")

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
