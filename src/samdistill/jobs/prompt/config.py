"""Configuration of the prompt job."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ...config.losses import loss_block
from ...config.parts import Count, EvaluateConfig, Fraction, Positive, Run, Strict, TrainConfig, Weight
from ...config.prompting import PromptableConfig, PromptsConfig, TeacherEntry
from .losses import DISTILLED_TERMS, TASK_TERMS

Epoch = Count
Scheduled = Weight | Annotated[dict[Epoch, Weight], Field(min_length=1)]
"""A number, or values by epoch: linear between them, constant before the first and after the last."""


def at_epoch(value: Scheduled, epoch: int) -> float:
    """Return the value in ``epoch`` (from 0)."""
    if not isinstance(value, dict):
        return float(value)
    points = sorted(value.items())
    for (start, low), (end, high) in pairwise(points):
        if start <= epoch < end:
            return low + (high - low) * (epoch - start) / (end - start)
    return float(points[0][1] if epoch < points[0][0] else points[-1][1])


class PatchTermConfig(Strict):
    """Term ``encoder_patch``."""

    enable: bool = True
    weight: Scheduled = 1.0
    w_l2: Weight = 1.0
    w_cos: Weight = 1.0


class EmbedTermConfig(Strict):
    """Term ``prompt_embed``."""

    enable: bool = True
    weight: Scheduled = 1.0
    w_mse: Weight = 0.7
    w_cos: Weight = 0.3


class TokenTermConfig(Strict):
    """Term ``decoder_mask_token``."""

    enable: bool = True
    weight: Scheduled = 1.0
    w_kl: Weight = 1.0
    temperature: Annotated[float, Field(gt=0)] = 0.5


class DenseTermConfig(Strict):
    """Term ``dense_mask_logits``."""

    enable: bool = True
    weight: Scheduled = 1.0
    w_kl: Weight = 0.6
    w_focal: Weight = 0.4
    gamma: Weight = 2.0


class DistillationConfig(Strict):
    """Distillation terms. Names and defaults are published, except for ``weight`` and the last three keys."""

    enable: bool = True
    use_precomputed_features: bool = False
    """Read the teachers' features from the cache. No teacher is in memory."""
    precomputed_root: Path | None = None
    """Root of the cache. None for ``features/`` in the run folder."""
    lambda_coef: Scheduled = 1.0
    encoder_patch: PatchTermConfig = PatchTermConfig()
    prompt_embed: EmbedTermConfig = EmbedTermConfig()
    decoder_mask_token: TokenTermConfig = TokenTermConfig()
    dense_mask_logits: DenseTermConfig = DenseTermConfig()
    standardise: bool | None = None
    """Divide each teacher's patch features by their standard deviation. None: only with several teachers."""
    sample: Positive = 64
    """Number of training images to fit the projection of a teacher's patch features on."""
    rounds: Literal["first", "all"] = "all"
    """Prompts for the teachers if ``prompts.rounds`` is set: the first ones, or all with the student's corrective
    clicks. The latter cannot be cached.
    """


class PromptCacheConfig(Strict):
    """Cache of the prompt job."""

    codec: Annotated[str, Field(pattern=r"^(fp16|fp32)$")] = "fp16"
    dense: bool = True
    """Store the teachers' mask logits too. A cached run needs them for the term ``dense_mask_logits``."""
    batch_size: Positive = 4

    @model_validator(mode="before")
    @classmethod
    def _published_switch(cls, given: Any) -> Any:
        if isinstance(given, dict) and "mode" in given:
            raise ValueError(
                "mode: in this job distillation.use_precomputed_features says whether teachers run (false) or are "
                "read from the cache (true)"
            )
        return given


PromptLossConfig = loss_block(
    "PromptLossConfig",
    "Weights of the task terms. A weight can be a schedule by epoch.",
    (TASK_TERMS,),
    Scheduled,
    focal_gamma=(Weight, 2.0),
    focal_alpha=(Fraction, 0.25),
)


class PromptRunConfig(Run):
    """Configuration of a prompt run. The resolved configuration is saved in the run folder."""

    job: Literal["prompt"] = "prompt"
    output: Path = Path("runs/prompt")
    student: PromptableConfig = PromptableConfig()
    teachers: tuple[TeacherEntry, ...] = ()
    prompts: PromptsConfig = PromptsConfig()
    distillation: DistillationConfig = DistillationConfig()
    cache: PromptCacheConfig = PromptCacheConfig()
    loss: PromptLossConfig = PromptLossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @field_validator("teachers")
    @classmethod
    def _teachers_differ(cls, teachers: tuple[TeacherEntry, ...]) -> tuple[TeacherEntry, ...]:
        names = [teacher.name for teacher in teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"two teachers have the same name: {', '.join(names)}")
        if teachers and sum(teacher.weight for teacher in teachers) <= 0:
            raise ValueError("the teachers' weights sum to zero: give at least one a weight above 0")
        return teachers

    @model_validator(mode="after")
    def _consistent(self) -> PromptRunConfig:
        if self.distilled and not self.teachers:
            raise ValueError("distillation is on without a teacher: list teachers, or set distillation.enable: false")
        if self.cached and self.prompts.candidates > 1:
            raise ValueError(
                "prompts.candidates: hard prompts are chosen during training and cannot be cached; set it to 1"
            )
        if self.cached and self.prompts.rounds and self.distillation.rounds == "all":
            raise ValueError(
                "prompts.rounds: corrective clicks depend on the student's errors and cannot be cached: "
                "set distillation.rounds: first, or prompts.rounds: 0"
            )
        if self.cached and not self.cache.dense and "dense_mask_logits" in self.distilled:
            raise ValueError("distillation.dense_mask_logits needs cache.dense: true, or enable: false")
        return self

    @classmethod
    def term_names(cls) -> tuple[str, ...]:
        return (*super().term_names(), *DISTILLED_TERMS.weights)

    @property
    def distilled(self) -> tuple[str, ...]:
        """Names of the enabled distillation terms."""
        on = self.distillation.enable
        return tuple(name for name in DISTILLED_TERMS.weights if on and getattr(self.distillation, name).enable)

    @property
    def cached(self) -> bool:
        """Whether the teachers' features are read from the cache."""
        return bool(self.distilled) and self.distillation.use_precomputed_features

    @property
    def feature_root(self) -> Path:
        """Root of the cache."""
        root = self.distillation.precomputed_root
        return root if root is not None else self.output / "features"
