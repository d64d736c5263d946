"""Factors of a detector's scores, written into the last layers of its heads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

LEAST, MOST = 0.125, 8.0
"""Limits of a factor. Without them it would be infinite for logits that already decide everything rightly."""
KEY = "score_factors"
"""Key of the factors in ``config.json``."""


@dataclass(frozen=True)
class ScoreFactors:
    """Inverse temperatures of a detector's logits.

    Attributes:
        query: Factor of the logits of object queries.
        presence: Factor of the logits of the presence of the concept.
    """

    query: float = 1.0
    presence: float = 1.0

    def to_dict(self) -> dict[str, float]:
        """Return the attributes by name."""
        return asdict(self)


def best_factor(logits: Tensor, decisions: Tensor) -> float:
    """Return the factor of ``logits`` with the lowest cross-entropy (temperature scaling, Guo et al., 2017).

    Args:
        logits: Logits of any shape.
        decisions: What they should say, of the same shape: 1 or True for yes, 0 or False for no.

    Returns:
        A value from 1/8 to 8.

    Example:
        >>> logits, decisions = torch.tensor([1.0, 1.0, 1.0, -1.0]), torch.tensor([1, 1, 0, 0])
        >>> round(best_factor(logits, decisions), 3)  # three of four are right: log(3)
        1.099
    """
    logits, decisions = logits.detach().double().flatten(), decisions.to(torch.float64).flatten()
    low, high = torch.tensor([LEAST, MOST], dtype=torch.float64, device=logits.device)
    for _ in range(60):  # the cross-entropy is convex in the factor: halve the interval by the sign of its slope
        middle = (low + high) / 2
        slope = (logits * ((middle * logits).sigmoid() - decisions)).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float((low + high) / 2)


@torch.no_grad()
def scale_scores(model: PreTrainedModel, factors: ScoreFactors) -> None:
    """Multiply query and presence logits of a SAM 3 by factors, in place.

    The factors go into the last linear layers of the two heads, so every program that reads the weights applies them.
    ``config.score_factors`` has them, multiplied by those of an earlier call. Neither order nor sign of logits changes.

    Args:
        model: A ``Sam3Model``, ``Sam3LiteTextModel`` or ``EfficientSam3Model``.
        factors: The factors.
    """
    heads: Any = model
    layers = heads.dot_product_scoring.query_proj, heads.detr_decoder.presence_head.layer3
    for layer, factor in zip(layers, (factors.query, factors.presence), strict=True):
        layer.weight.mul_(factor)
        layer.bias.mul_(factor)
    before = ScoreFactors(**(getattr(model.config, KEY, None) or {}))
    both = ScoreFactors(before.query * factors.query, before.presence * factors.presence)
    setattr(model.config, KEY, both.to_dict())
