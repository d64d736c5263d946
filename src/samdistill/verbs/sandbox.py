"""``samdistill sandbox``: render a data set, train a bundled teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..io import as_path
from ..locks import locked
from ..registry import did_you_mean
from ..sandbox.detector_training import train_detector
from ..sandbox.sam_training import train_mobile, train_sam
from ..sandbox.training import TrainedTeacher, train_tracker
from ..sandbox.write import write_coco, write_concept_set, write_sa1b
from ..sandbox.write_videos import write_sav
from ..types import UserError
from .progress import Progress


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


@dataclass(frozen=True)
class Layout:
    """How a split is written, what it consists of, and how many of these there are unless somebody says so."""

    write: Callable[..., list[str]]
    things: str
    train: int
    val: int


LAYOUTS = {
    "sa1b": Layout(write_sa1b, "scenes", 2000, 128),
    "coco": Layout(write_coco, "scenes", 2000, 128),
    "sav": Layout(write_sav, "videos", 64, 16),
}


def render_sandbox(
    target: str | Path, *, train: int | None = None, val: int | None = None, size: int = 168, seed: int = 10,
    format: Literal["sa1b", "coco", "sav"] = "sa1b", progress: bool = True,
) -> dict[str, int]:  # fmt: skip
    """Render scenes of ``size`` pixels as an SA-1B tree or as COCO, or videos as SA-V: world ``seed`` to train on, the
    next held out.

    train, val: how many; None takes 2000 and 128 scenes, 64 and 16 videos. COCO comes with questions about the held-out
    scenes and their ground truth, ``concepts_val.json`` in SA-Co's layout. Returns the number per split. A killed call
    goes on where it died.
    """
    if format not in LAYOUTS:
        raise UserError(f"no layout is called {format!r}{did_you_mean(format, list(LAYOUTS))}")
    layout, target = LAYOUTS[format], as_path(target)
    counts = {"train": layout.train if train is None else train, "val": layout.val if val is None else val}
    with locked(target, "sandbox render"):
        for world, (split, count) in enumerate(counts.items(), seed):
            with Progress(f"rendering {split}", count, layout.things, progress) as bar:
                layout.write(
                    target, count, size, seed=world, split=split, progress=lambda done, _, bar=bar: bar.at(done)
                )
        if format == "coco":
            with Progress("asking about val", counts["val"], layout.things, progress) as bar:
                write_concept_set(target, counts["val"], size, seed + 1, "val", progress=lambda done, _: bar.at(done))
    return counts


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
