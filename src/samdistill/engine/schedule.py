"""Learning rate and data order as pure functions of the step: nothing to save, nothing to drift after a resume."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from ..config import PhaseConfig, TrainConfig
from ..types import UserError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine. Call it with the index of a step, 0 .. total - 1; later steps stay at ``minimum``.

    Step 0 runs at ``start``, step ``warmup`` at exactly ``base``, step ``total - 1`` at exactly ``minimum``.
    """

    total: int
    warmup: int
    base: float
    start: float
    minimum: float

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.start + (self.base - self.start) * step / self.warmup
        if step == self.warmup:
            return self.base
        progress = min(1.0, (step - self.warmup) / max(1, self.total - 1 - self.warmup))
        return self.minimum + (self.base - self.minimum) * (0.5 * (1 + math.cos(math.pi * progress)))

    @classmethod
    def of(cls, config: TrainConfig, steps_per_epoch: int) -> Schedule:
        """The schedule of a run; all three rates are scaled by ``batch_size / lr_batch``.

        Raises ``UserError`` for a warm-up that leaves no step, and for rates that do not fall from the base.
        """
        total, warmup = config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
        if warmup >= total:
            raise UserError(
                f"train.warmup_epochs={config.warmup_epochs:g} leaves no step of train.epochs={config.epochs}: "
                "the base rate would never be reached; shorten the warm-up or train longer"
            )
        for key in ("warmup_lr", "min_lr"):
            if not 0 <= getattr(config, key) <= config.lr:
                raise UserError(
                    f"train.{key}={getattr(config, key):g} must lie between 0 and train.lr={config.lr:g}; change either"
                )
        scale = rate_scale(config)
        return cls(total, warmup, config.lr * scale, config.warmup_lr * scale, config.min_lr * scale)

    @classmethod
    def of_phase(cls, phase: PhaseConfig, scale: float, steps_per_epoch: int) -> Schedule:
        """The schedule of one phase. Raises ``UserError`` as ``of`` does."""
        total = phase.epochs * steps_per_epoch
        if phase.warmup_steps >= total:
            raise UserError(
                f"train.phases: phase {phase.name!r} has {total} steps, its warm-up of {phase.warmup_steps} leaves "
                "none at the base rate; shorten warmup_steps or train longer"
            )
        for key in ("warmup_lr", "min_lr"):
            if getattr(phase, key) > phase.lr:
                raise UserError(
                    f"train.phases: phase {phase.name!r}: {key}={getattr(phase, key):g} exceeds lr={phase.lr:g}"
                )
        return cls(total, phase.warmup_steps, phase.lr * scale, phase.warmup_lr * scale, phase.min_lr * scale)


def rate_scale(config: TrainConfig) -> float:
    """What every rate is multiplied by: ``batch_size / lr_batch``."""
    return 1.0 if config.lr_batch is None else config.batch_size / config.lr_batch


@dataclass(frozen=True)
class Phases:
    """The schedules of a run's phases, end to end: the rate stays a function of the step alone."""

    parts: tuple[Schedule, ...]

    @classmethod
    def of(cls, config: TrainConfig, steps_per_epoch: int) -> Phases:
        """Of ``config.phases``, or the one schedule of a run without."""
        if config.phases is None:
            return cls((Schedule.of(config, steps_per_epoch),))
        scale = rate_scale(config)
        return cls(tuple(Schedule.of_phase(phase, scale, steps_per_epoch) for phase in config.phases))

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)

    def __call__(self, step: int) -> float:
        """The rate of a step, 0 .. total - 1; later ones stay at the last phase's minimum."""
        for part in self.parts[:-1]:
            if step < part.total:
                return part(step)
            step -= part.total
        return self.parts[-1](step)


def stream_seed(*parts: int) -> int:
    """A 63-bit seed that differs for every tuple of numbers; the same on every platform."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Shard:
    """How a global batch is divided: first into ``accumulate`` micro-batches, then over ``world`` ranks."""

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.accumulate * self.world):
            raise UserError(
                f"train.batch_size={self.batch_size} is global and must divide evenly: it is not a multiple of "
                f"{self.world} rank(s) x train.accumulate={self.accumulate}; "
                f"try {math.ceil(self.batch_size / (self.accumulate * self.world)) * self.accumulate * self.world}"
            )

    @property
    def local(self) -> int:
        """Images in one forward pass of one rank."""
        return self.batch_size // (self.accumulate * self.world)

    def steps_per_epoch(self, items: int) -> int:
        """Whole global batches in a data set; the rest of an epoch's permutation is dropped."""
        if items < self.batch_size:
            raise UserError(
                f"the data set has {items} image(s), fewer than one batch of train.batch_size={self.batch_size}; "
                "lower train.batch_size or give more data"
            )
        return items // self.batch_size


class GlobalBatches(Sampler[list[int]]):
    """One rank's micro-batches of an epoch, in order, from step ``skip`` on; skipped items are never touched.

    The epoch's permutation depends on ``seed`` and ``epoch`` alone, so whatever the number of ranks and micro-batches
    the union over them is the same global batch at every step.
    """

    def __init__(self, items: int, shard: Shard, seed: int, epoch: int, skip: int = 0) -> None:
        self.items, self.shard, self.seed, self.epoch, self.skip = items, shard, seed, epoch, skip

    def __len__(self) -> int:
        return (self.items // self.shard.batch_size - self.skip) * self.shard.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(stream_seed(self.seed, self.epoch))
        order = torch.randperm(self.items, generator=generator)
        shard = self.shard
        for step in range(self.skip, self.items // shard.batch_size):
            whole = order[step * shard.batch_size : (step + 1) * shard.batch_size]
            for micro in whole.chunk(shard.accumulate):
                yield micro[shard.rank :: shard.world].tolist()
