"""Configuration of the detection job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator

from ...config.parts import (
    CacheConfig,
    CachedRun,
    Fraction,
    Positive,
    Strict,
    TeacherConfig,
    TrainConfig,
    Weight,
    loss_block,
    registered,
)
from ...config.questions import QuestionsConfig
from ...registry import MATCHERS
from .losses import FEATURE_TERMS, OUTPUT_TERMS


class TextConfig(Strict):
    """The student's text encoder: MobileCLIP's, of MobileCLIP-S1's size by default."""

    hidden: Positive = 512
    layers: Positive = 12
    heads: Positive = 8
    ffn: Positive = 2048
    context: Positive = 32
    """Tokens a phrase may have, begin and end marks included."""


class DetectorConfig(Strict):
    """EfficientSam3. Its width is the teacher's: the features of both are compared channel by channel."""

    backbone: str = "es_rv_l"
    """A student's name (es_rv_m) or any timm model with maps at strides 4, 8, 16 and 32."""
    pretrained: bool | Path = False
    """True downloads timm's ImageNet weights; a path reads them from a file."""
    trunk: Path | None = None
    """A finished run of the encoder job (or its ``student/``), whose backbone's weights are the start."""
    start: Path | None = None
    """A finished run of this job (or its ``student/``) with the same student, whose weights are all taken."""
    inherit: bool = False
    """Heads start from the teacher's wherever name and shape fit; layers and queries are taken evenly."""
    queries: Positive = 100
    encoder_layers: Positive = 3
    decoder_layers: Positive = 3
    heads: Positive = 8
    ffn: Positive = 1024
    checkpointing: bool = False
    """Compute the backbone's stages again in the backward pass instead of keeping what they computed."""
    text: TextConfig = TextConfig()

    @model_validator(mode="after")
    def _one_start(self) -> DetectorConfig:
        if sum((self.trunk is not None, self.pretrained is not False, self.start is not None)) > 1:
            raise ValueError("give one of 'trunk', 'pretrained' and 'start'")
        if self.start is not None and self.inherit:
            raise ValueError("'inherit' would replace heads that 'start' brings; give one of them")
        return self


class MatchConfig(Strict):
    """Which student query learns from which teacher query."""

    method: Annotated[str, AfterValidator(registered(MATCHERS))] = "hungarian"
    mask: Weight = 2.0
    box: Weight = 5.0
    logit: Weight = 2.0
    resolution: Positive = 72
    """Side in pixels at which masks are compared."""
    floor: Fraction = 0.0
    """Teacher queries that score less are no target; the student queries left over learn "no object"."""


DetectionLossConfig = loss_block(
    "DetectionLossConfig",
    'Weights of the terms, as described. ``unmatched``: student queries without a pair are taught "no object".',
    (OUTPUT_TERMS, FEATURE_TERMS),
    unmatched=(bool, True),
)


FEATURES = frozenset({"fpn"})
"""The terms that need the teacher's pyramid alone, which can be cached; its answers are larger and cannot."""


class PyramidCacheConfig(CacheConfig):
    """The teacher's pyramid for the phases of ``fpn`` alone."""

    mode: Literal["stored", "online"] = "online"


class ConceptEvaluateConfig(Strict):
    concepts: Path | None = None
    """Held-out questions with their masks, in the SA-Co layout; None looks for one in ``data.root``."""
    threshold: Fraction = 0.5
    images: Positive | None = None
    """At most this many held-out images; None takes all."""
    batch_size: Positive = 4


class DetectionRunConfig(CachedRun):
    """One run of detection distillation: everything needed to repeat it. Written resolved into the run folder."""

    job: Literal["detection"] = "detection"
    output: Path = Path("runs/detection")
    teacher: TeacherConfig
    student: DetectorConfig = DetectorConfig()
    questions: QuestionsConfig = QuestionsConfig()
    match: MatchConfig = MatchConfig()
    cache: PyramidCacheConfig = PyramidCacheConfig()
    loss: DetectionLossConfig = DetectionLossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: ConceptEvaluateConfig = ConceptEvaluateConfig()

    @model_validator(mode="after")
    def _cached_pyramid_is_read(self) -> DetectionRunConfig:
        if not self.online and not any(self.of_features(epoch) for epoch in range(self.train.total_epochs)):
            raise ValueError(
                "cache.mode=stored: only a phase of fpn alone learns from a cache, and train.phases has none; "
                "set cache.mode=online"
            )
        return self

    def wanted(self, epoch: int) -> frozenset[str]:
        """Names of the terms of the epoch's phase."""
        phase = self.train.phase_at(epoch)
        return frozenset(self.loss.named if phase is None or phase.terms is None else phase.terms)

    def of_features(self, epoch: int) -> bool:
        """Whether the epoch learns from the teacher's pyramid alone."""
        return self.wanted(epoch) == FEATURES
