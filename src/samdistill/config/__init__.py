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
from .parts import (
    AugmentConfig,
    CacheConfig,
    DataConfig,
    FreezeConfig,
    PhaseConfig,
    RateConfig,
    Run,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from .prompt import (
    DistillationConfig,
    PromptableConfig,
    PromptLossConfig,
    PromptRunConfig,
    PromptsConfig,
    TeacherEntry,
    at_epoch,
)
from .video import (
    ClipsConfig,
    MemoryConfig,
    VideoEvaluateConfig,
    VideoLossConfig,
    VideoRunConfig,
    VideoStudentConfig,
)

__all__ = [
    "JOBS", "AnyRun", "AugmentConfig", "CacheConfig", "ClipsConfig", "ConceptEvaluateConfig", "DataConfig",
    "DetectionLossConfig", "DetectionRunConfig", "DetectorConfig", "DistillationConfig", "EncoderLossConfig",
    "EvaluateConfig", "FreezeConfig", "MatchConfig", "MemoryConfig", "PhaseConfig", "PromptLossConfig",
    "PromptRunConfig", "PromptableConfig", "PromptsConfig", "QuestionsConfig", "RateConfig", "Run", "RunConfig",
    "StudentConfig", "TeacherConfig", "TeacherEntry", "TextConfig", "TrainConfig", "VideoEvaluateConfig",
    "VideoLossConfig", "VideoRunConfig", "VideoStudentConfig", "at_epoch", "load_config", "packaged", "validate",
]  # fmt: skip
