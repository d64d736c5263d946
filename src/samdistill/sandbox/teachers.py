"""Training of the bundled teachers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..io import as_path
from ..locks import locked
from ..registry import did_you_mean
from ..types import UserError
from .detector_training import train_detector
from .sam_training import train_mobile, train_sam
from .training import TrainedTeacher, train_tracker


@dataclass(frozen=True)
class Trainer:
    """How a teacher is trained, and with what unless something else is asked for."""

    train: Callable[[Path, int, int, float, Path | None], TrainedTeacher]
    steps: int
    batch_size: int
    lr: float


TEACHERS = {
    "tracker": Trainer(train_tracker, 5000, 8, 1e-3),
    "detector": Trainer(train_detector, 5000, 10, 5e-4),
    "sam": Trainer(train_sam, 3000, 8, 6e-4),
    "mobile": Trainer(train_mobile, 250, 8, 1e-3),
}


def train_teacher(
    name: str, out: str | Path, *, steps: int | None = None, batch_size: int | None = None, lr: float | None = None,
    weights: str | Path | None = None,
) -> TrainedTeacher:  # fmt: skip
    """Train the bundled teacher ``name`` on scenes rendered on the fly and score it on held-out ones.

    steps, batch_size and lr: None takes the teacher's own. The same call goes on where an earlier one stopped.
    """
    if name not in TEACHERS:
        raise UserError(f"no sandbox teacher is called {name!r}{did_you_mean(name, list(TEACHERS))}")
    trainer = TEACHERS[name]
    steps = trainer.steps if steps is None else steps
    batch_size = trainer.batch_size if batch_size is None else batch_size
    start = None if weights is None else as_path(weights)
    folder = as_path(out)
    with locked(folder, "sandbox train-teacher"):
        return trainer.train(folder, steps, batch_size, trainer.lr if lr is None else lr, start)
