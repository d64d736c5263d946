"""Learning rate and data order as functions of the step, so that a resumed run needs no saved state for them."""

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
    """Linear warm-up and cosine decay. Call it with the index of a step, from 0 to ``total - 1``.

    Attributes:
        total: Number of steps. Later steps have the rate ``minimum``.
        warmup: Steps of the warm-up.
        base: Rate at step ``warmup``.
        start: Rate at step 0.
        minimum: Rate at step ``total - 1``.
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
        """Return the schedule of a run without phases. All three rates are multiplied by ``batch_size / lr_batch``.

        Raises:
            UserError: The warm-up is as long as the run, or a rate is not in 0..``config.lr``.
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
        """Return the schedule of one phase, with all rates multiplied by ``scale``.

        Raises:
            UserError: The warm-up is as long as the phase, or a rate exceeds the base rate.
        """
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
    """Return the factor of all learning rates, ``batch_size / lr_batch``, or 1 without ``lr_batch``."""
    return 1.0 if config.lr_batch is None else config.batch_size / config.lr_batch


@dataclass(frozen=True)
class Phases:
    """The schedules of consecutive phases as one function of the step."""

    parts: tuple[Schedule, ...]

    @classmethod
    def of(cls, config: TrainConfig, steps_per_epoch: int) -> Phases:
        """Return the schedules of ``config.phases``, or the single schedule of a run without phases.

        Raises:
            UserError: A schedule is not possible, or ``config.qat`` begins after the last step.
        """
        scale = rate_scale(config)
        if config.phases is None:
            found = cls((Schedule.of(config, steps_per_epoch),))
        else:
            found = cls(tuple(Schedule.of_phase(phase, scale, steps_per_epoch) for phase in config.phases))
        if config.qat is not None and config.qat >= found.total:
            raise UserError(f"train.qat={config.qat}: the run has {found.total} steps; begin earlier")
        return found

    @property
    def total(self) -> int:
        """Number of steps of all phases."""
        return sum(part.total for part in self.parts)

    def __call__(self, step: int) -> float:
        """Return the rate of a step, from 0 to ``total - 1``. Later steps have the last phase's minimum."""
        for part in self.parts[:-1]:
            if step < part.total:
                return part(step)
            step -= part.total
        return self.parts[-1](step)


def stream_seed(*parts: int) -> int:
    """Return a 63-bit seed that is a hash of the numbers, the same on every platform."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Shard:
    """Division of a global batch, first into micro-batches, then over ranks.

    Attributes:
        batch_size: Items in the global batch.
        accumulate: Number of micro-batches.
        rank: Rank of this process.
        world: Number of ranks.

    Raises:
        UserError: ``batch_size`` is not a multiple of ``accumulate * world``.
    """

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
        """Items in one forward pass of one rank."""
        return self.batch_size // (self.accumulate * self.world)

    def steps_per_epoch(self, items: int) -> int:
        """Return the number of whole global batches. The remaining items of an epoch are not used.

        Raises:
            UserError: There are fewer items than ``batch_size``.
        """
        if items < self.batch_size:
            raise UserError(
                f"the data set has {items} image(s), fewer than one batch of train.batch_size={self.batch_size}; "
                "lower train.batch_size or give more data"
            )
        return items // self.batch_size


class GlobalBatches(Sampler[list[int]]):
    """Sampler of one rank's micro-batches of an epoch, from step ``skip``. Skipped items are not read.

    The permutation depends on ``seed`` and ``epoch`` only. At every step the union over ranks and micro-batches is
    therefore the same global batch for any number of them.
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
