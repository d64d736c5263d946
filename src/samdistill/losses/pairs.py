"""Means over the pairs of a ``Matches``, question after question."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..ops.matching import Matches


def pick(values: Tensor, question: Tensor, query: Tensor) -> Tensor:
    """values[question, query], over one flat axis: its gradient is ten times quicker on the CPU."""
    return values.flatten(0, 1)[question * values.shape[1] + query]


def mean(per_item: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """0 for none, still attached to the graph."""
    return per_item.sum() / max(len(per_item), 1)


def over_pairs(per_pair: Float[Tensor, " m"], matches: Matches) -> Float[Tensor, ""]:
    """Mean of each question's pairs, then over the questions."""
    table = per_pair.new_zeros(matches.valid.shape).masked_scatter(matches.valid, per_pair)
    return mean(table.sum(1) / matches.valid.sum(1).clamp(min=1))
