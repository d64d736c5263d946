"""Adjustment of a recipe to the number of training items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import Run
from ..types import UserError


def fitted(config: Run, count: int, overrides: Sequence[str]) -> Run:
    """Reduce the batch size to a quarter of the items if there are few, scale the learning rate, shorten the warm-up.

    Values in ``overrides`` are kept. The published rate is linear in the batch size, which is too low for small data
    sets. With Adam, the square root of the batch size is used.

    Args:
        config: The recipe.
        count: Number of training items.
        overrides: ``key=value`` settings of the caller.

    Raises:
        UserError: There are fewer than two items.
    """
    given = {text.partition("=")[0] for text in overrides}
    if count < 2:
        raise UserError(f"{config.data.root}: {count} input(s) to train on; give at least three, one is held out")
    settings: dict[str, Any] = {}
    if "train.batch_size" not in given:
        fit = min(config.train.batch_size, max(2, count // 4))
        settings["batch_size"] = fit - fit % config.train.accumulate or config.train.accumulate
    if config.train.phases is not None:  # phases have their own rates
        if "train.phases" not in given:
            per_epoch = count // settings.get("batch_size", config.train.batch_size)
            settings["phases"] = tuple(
                phase.model_copy(update={"warmup_steps": min(phase.warmup_steps, phase.epochs * per_epoch // 10)})
                for phase in config.train.phases
            )
        return config.model_copy(update={"train": config.train.model_copy(update=settings)})
    if config.train.lr_batch is not None and not given & {"train.lr", "train.lr_batch"}:
        share = (settings.get("batch_size", config.train.batch_size) / config.train.lr_batch) ** 0.5
        rates = {name: getattr(config.train, name) * share for name in ("lr", "warmup_lr", "min_lr")}
        settings |= rates | {"lr_batch": None}
    if "train.warmup_epochs" not in given:
        settings["warmup_epochs"] = min(config.train.warmup_epochs, config.train.epochs / 10)
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})
