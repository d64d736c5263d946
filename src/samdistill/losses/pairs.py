"""Means over the matched pairs of a ``Matches``, first within each question."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from ..ops.matching import Matches


def pick(values: Tensor, question: Tensor, query: Tensor) -> Tensor:
    """Return ``values[question, query]``. One flat index makes the backward pass ten times faster on the CPU."""
    return values.flatten(0, 1)[question * values.shape[1] + query]


def mean(per_item: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return the mean, or 0 for an empty tensor, still attached to the graph."""
    return per_item.sum() / max(len(per_item), 1)


def over_pairs(
    per_pair: Float[Tensor, " m"], matches: Matches, among: Bool[Tensor, " p"] | None = None
) -> Float[Tensor, ""]:
    """Average over the pairs of each question, then over the questions, or over those ``among`` selects."""
    table = per_pair.new_zeros(matches.valid.shape).masked_scatter(matches.valid, per_pair)
    each = table.sum(1) / matches.valid.sum(1).clamp(min=1)
    return mean(each if among is None else each[among])
