"""Compare models on a data set: features, prompted masks, agreement with a teacher, and cost."""

from ..inference.prompting import PROMPTS, PromptKind, Targets, prompted_masks
from .agreement import PseudoObjects
from .result import EvaluationResult, Panel, Picture
from .rows import ModelRow
from .runner import evaluate_models

__all__ = [
    "PROMPTS",
    "EvaluationResult",
    "ModelRow",
    "Panel",
    "Picture",
    "PromptKind",
    "PseudoObjects",
    "Targets",
    "evaluate_models",
    "prompted_masks",
]
