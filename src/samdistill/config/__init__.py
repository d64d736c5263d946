"""Typed, strict run configurations: one class per job, YAML with ``extends``, ``key=value`` overrides."""

from .detection import (
    ConceptEvaluateConfig,
    DetectionLossConfig,
    DetectionRunConfig,
    DetectorConfig,
    MatchConfig,
    QuestionsConfig,
    TextConfig,
)
from .encoder import EncoderLossConfig, EvaluateConfig, RunConfig
from .loading import JOBS, AnyRun, load_config, packaged, validate
from .parts import AugmentConfig, CacheConfig, DataConfig, PhaseConfig, Run, StudentConfig, TeacherConfig, TrainConfig

__all__ = [
    "JOBS", "AnyRun", "AugmentConfig", "CacheConfig", "ConceptEvaluateConfig", "DataConfig", "DetectionLossConfig",
    "DetectionRunConfig", "DetectorConfig", "EncoderLossConfig", "EvaluateConfig", "MatchConfig", "PhaseConfig",
    "QuestionsConfig", "Run", "RunConfig", "StudentConfig", "TeacherConfig", "TextConfig", "TrainConfig",
    "load_config", "packaged", "validate",
]  # fmt: skip
