"""A recipe for the number of images that there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import Run
from ..types import UserError


def fitted(config: Run, count: int, overrides: Sequence[str]) -> Run:
    """The recipe's batch where there are items for it, else four steps an epoch; what the caller set stays.

    The published rate is linear in the batch, which starves a small folder; Adam's noise asks for the square root.
    count: items to train on. Raises ``UserError`` for fewer than two.
    """
    given = {text.partition("=")[0] for text in overrides}
    if count < 2:
        raise UserError(f"{config.data.root}: {count} input(s) to train on; give at least three, one is held out")
    settings: dict[str, Any] = {}
    if "train.batch_size" not in given:
        fit = min(config.train.batch_size, max(2, count // 4))
        settings["batch_size"] = fit - fit % config.train.accumulate or config.train.accumulate
    if config.train.phases is not None:  # they have rates and warm-ups of their own
        return config.model_copy(update={"train": config.train.model_copy(update=settings)})
    if config.train.lr_batch is not None and not given & {"train.lr", "train.lr_batch"}:
        share = (settings.get("batch_size", config.train.batch_size) / config.train.lr_batch) ** 0.5
        rates = {name: getattr(config.train, name) * share for name in ("lr", "warmup_lr", "min_lr")}
        settings |= rates | {"lr_batch": None}
    if "train.warmup_epochs" not in given:
        settings["warmup_epochs"] = min(config.train.warmup_epochs, config.train.epochs / 10)
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})
