"""Weights of the parts of a global batch, which make results independent of ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def shares(
    counts: Sequence[Mapping[str, int]], world: int, reduce: Callable[[Tensor], Tensor], device: torch.device
) -> list[dict[str, Float[Tensor, ""]]]:
    """Return the factor of each term's value for each micro-batch of this rank.

    The factor is the count of the part divided by the average count of all parts. It is exactly 1 if counts are equal,
    0 for a part without units, and 1 if no part has any. The mean of value times factor over micro-batches and ranks is
    then the mean over the units of the global batch.

    Args:
        counts: Counts of this rank's micro-batches by name, see ``Task.counts``.
        world: Number of ranks.
        reduce: Function that sums a tensor over ranks.
        device: Device of the factors.
    """
    names = list(counts[0])
    if not names or len(counts) * world == 1:
        return [{} for _ in counts]
    own = torch.tensor([[float(each[name]) for name in names] for each in counts], device=device)
    total = reduce(own.sum(0))
    factors = torch.where(total > 0, own * (len(counts) * world) / total, 1.0)
    return [dict(zip(names, row.unbind(), strict=True)) for row in factors]
