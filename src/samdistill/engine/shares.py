"""What each part of a global batch counts for, so that dividing it over ranks and micro-batches changes no result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def shares(
    counts: Sequence[Mapping[str, int]], world: int, reduce: Callable[[Tensor], Tensor], device: torch.device
) -> list[dict[str, Float[Tensor, ""]]]:
    """For each micro-batch of this rank and each name: the factor of its value in a mean over micro-batches and ranks.

    counts: of this rank's micro-batches, see ``Task.counts``. reduce: sums a tensor over the ranks. A factor is the
    part's count over the average count of all parts: exactly 1 where they are equal, 0 for a part without units, 1
    where no part has any. The mean of value times factor is then the mean over the units of the global batch.
    """
    names = list(counts[0])
    if not names or len(counts) * world == 1:
        return [{} for _ in counts]
    own = torch.tensor([[float(each[name]) for name in names] for each in counts], device=device)
    total = reduce(own.sum(0))
    factors = torch.where(total > 0, own * (len(counts) * world) / total, 1.0)
    return [dict(zip(names, row.unbind(), strict=True)) for row in factors]
