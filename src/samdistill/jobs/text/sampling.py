"""Selection of the phrases of an epoch. Phrases with a large loss can be drawn more often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...engine.schedule import stream_seed
from ...engine.state import gather

_STREAM = 1
"""Distinguishes the draws from those of the engine, which use the same seed."""


class PhraseSampler:
    """Phrases of each epoch: some at random without repetition, the others in proportion to their loss.

    The loss of a phrase is its mean in the last epoch that had it. All ranks select the same phrases. The state is part
    of the run's checkpoints, so a resumed run selects what an uninterrupted one does.
    """

    def __init__(self, count: int, passes: int = 1, hard: float = 0.0, seed: int = 0, once: int = 0) -> None:
        """Set up the sampler.

        Args:
            count: Number of phrases with ``passes`` items.
            passes: Number of items per phrase in an epoch.
            hard: Share of the items that is drawn by loss, 0..1.
            seed: Seed of the draws.
            once: Number of further phrases, with the numbers after ``count``, that have one item each.
        """
        self.count, self.hard, self.seed = count + once, hard, seed
        self.everything = torch.cat([torch.arange(count).repeat(passes), torch.arange(count, count + once)])
        self.epoch = 0
        self.losses = torch.ones(self.count, dtype=torch.float64)
        self._clear()

    def _clear(self) -> None:
        self.sums, self.seen = torch.zeros(self.count, dtype=torch.float64), torch.zeros(self.count, dtype=torch.int64)

    def record(self, numbers: Int[Tensor, " p"], losses: Float[Tensor, " p"]) -> None:
        """Add the losses of a batch. Does nothing if no phrase is drawn by loss."""
        if self.hard:
            where = numbers.cpu()
            self.sums.index_add_(0, where, losses.detach().double().cpu())
            self.seen.index_add_(0, where, torch.ones_like(where))

    def order(self, epoch: int) -> list[int]:
        """Return the numbers of the phrases of ``epoch``. Every rank calls it at the start of the epoch."""
        everything = self.everything
        if not self.hard:
            return everything.tolist()
        if epoch != self.epoch:
            self._advance(epoch)
        drawn = round(self.hard * len(everything)) if epoch else 0
        generator = torch.Generator().manual_seed(stream_seed(self.seed, epoch, _STREAM))
        order = everything[torch.randperm(len(everything), generator=generator)[drawn:]]
        if drawn:
            order = torch.cat([order, torch.multinomial(self.losses, drawn, replacement=True, generator=generator)])
        return order.tolist()

    def _advance(self, epoch: int) -> None:
        """Begin an epoch: turn the sums of all ranks into losses. A phrase that no rank had keeps its loss."""
        ranks = gather((self.sums, self.seen))
        sums, seen = (torch.stack(part).sum(0) for part in zip(*ranks, strict=True))
        # multinomial needs a positive sum of weights
        self.losses = torch.where(seen > 0, sums / seen.clamp(min=1), self.losses).clamp(min=1e-6)
        self.epoch = epoch
        self._clear()

    def state(self) -> dict[str, Tensor]:
        """Return the state of this rank; empty if no phrase is drawn by loss."""
        if not self.hard:
            return {}
        return {"epoch": torch.tensor(self.epoch), "losses": self.losses, "sums": self.sums, "seen": self.seen}

    def load_state(self, states: Sequence[Mapping[str, Tensor]], rank: int, world: int) -> None:
        """Load what ``state`` returned on every rank.

        Args:
            states: One state per rank that wrote the checkpoint.
            rank: Rank of this process.
            world: Number of ranks. If it differs from that of ``states``, rank 0 gets the sums of all.
        """
        if not self.hard or not states:
            return
        self.epoch, self.losses = int(states[0]["epoch"]), states[0]["losses"].clone()
        self._clear()
        mine = states[rank : rank + 1] if len(states) == world else states if rank == 0 else ()
        for state in mine:
            self.sums, self.seen = self.sums + state["sums"], self.seen + state["seen"]
