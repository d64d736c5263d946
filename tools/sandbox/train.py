"""Train a bundled teacher of the sandbox on rendered scenes, and score it on held-out scenes.

``python tools/sandbox/train.py NAME --out runs/teacher --steps 5000``: NAME is ``tracker``, ``detector``, ``sam`` or
``mobile``. The weights are written to ``OUT/weights``. The same command resumes an interrupted training (see
docs/sandbox.md). Exit codes: 0 success, 2 a user error, reported in one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from detector_training import train_detector
from prompt_training import MOBILE, SAM, TRACKER, TrainedTeacher, train_promptable
from samdistill.locks import locked
from samdistill.processes import sigterm_interrupts
from samdistill.registry import did_you_mean
from samdistill.types import UserError


@dataclass(frozen=True)
class Trainer:
    """Training function of a teacher, and its default settings."""

    train: Callable[[Path, int, int, float, Path | None], TrainedTeacher]
    steps: int
    batch_size: int
    lr: float


TEACHERS = {
    "tracker": Trainer(partial(train_promptable, TRACKER), 5000, 8, 1e-3),
    "detector": Trainer(train_detector, 5000, 10, 5e-4),
    "sam": Trainer(partial(train_promptable, SAM), 3000, 8, 6e-4),
    "mobile": Trainer(partial(train_promptable, MOBILE), 250, 8, 1e-3),
}


def train_teacher(
    name: str, out: Path, steps: int | None = None, batch_size: int | None = None, lr: float | None = None,
    weights: Path | None = None,
) -> TrainedTeacher:  # fmt: skip
    """Train a teacher.

    Args:
        name: ``tracker``, ``detector``, ``sam`` or ``mobile``.
        out: Run folder.
        steps: Optimiser steps. None uses the default of the teacher, as for the next two.
        batch_size: Scenes per step.
        lr: Base learning rate.
        weights: Folder or packaged name of the initial weights. None uses the recipe's initialisation.

    Raises:
        UserError: The name is unknown, the weights are of another kind, the folder has a run with other settings, or
            another process writes to it.
    """
    if name not in TEACHERS:
        raise UserError(f"no sandbox teacher is called {name!r}{did_you_mean(name, list(TEACHERS))}")
    trainer = TEACHERS[name]
    steps = trainer.steps if steps is None else steps
    batch_size = trainer.batch_size if batch_size is None else batch_size
    with locked(out, "train.py"):
        return trainer.train(out, steps, batch_size, trainer.lr if lr is None else lr, weights)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="tracker, detector, sam or mobile")
    parser.add_argument("--out", type=Path, default=Path("runs/teacher"))
    parser.add_argument("--steps", type=int, help="optimiser steps (5000, 5000, 3000, 250)")
    parser.add_argument("--batch-size", type=int, help="scenes a step (8; detector 10)")
    parser.add_argument("--lr", type=float, help="base rate (0.001, 0.0005, 0.0006, 0.001)")
    parser.add_argument("--weights", type=Path, help="start from this teacher instead of from scratch")
    args = parser.parse_args(argv)
    try:
        with sigterm_interrupts():
            found = train_teacher(args.name, args.out, args.steps, args.batch_size, args.lr, args.weights)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    figures = ", ".join(f"{kind} {value:.4f}" for kind, value in found.figures.items())
    print(f"{found.folder}: {found.steps} steps in {found.seconds:.0f} s; held out: {figures}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
