"""Configuration: typed, strict blocks for all jobs, YAML files with ``extends``, and ``key=value`` overrides."""

from .loading import packaged
from .parts import (
    AugmentConfig,
    CacheConfig,
    DataConfig,
    EvaluateConfig,
    FreezeConfig,
    PhaseConfig,
    RateConfig,
    Run,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from .prompting import PromptableConfig, PromptsConfig, TeacherEntry
from .questions import QuestionsConfig

__all__ = [
    "AugmentConfig", "CacheConfig", "DataConfig", "EvaluateConfig", "FreezeConfig", "PhaseConfig", "PromptableConfig",
    "PromptsConfig", "QuestionsConfig", "RateConfig", "Run", "StudentConfig", "TeacherConfig", "TeacherEntry",
    "TrainConfig", "packaged",
]  # fmt: skip
