"""``samdistill sandbox``: render a data set, train a bundled teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..registry import did_you_mean
from ..sandbox.training import TEACHERS, TrainedTeacher
from ..sandbox.write import write_coco, write_concept_set, write_sa1b
from ..types import UserError
from .progress import Progress


def render_sandbox(
    target: Path, *, train: int = 2000, val: int = 128, size: int = 168, seed: int = 10,
    format: Literal["sa1b", "coco"] = "sa1b", progress: bool = True,
) -> dict[str, int]:  # fmt: skip
    """Render scenes of ``size`` pixels as an SA-1B tree or as COCO: world ``seed`` to train on, the next held out.

    COCO comes with questions about the held-out scenes and their ground truth, ``concepts_val.json`` in SA-Co's layout.
    Returns the number of scenes per split. A killed call goes on where it died.
    """
    write = write_sa1b if format == "sa1b" else write_coco
    counts = {"train": train, "val": val}
    for world, (split, count) in enumerate(counts.items(), seed):
        with Progress(f"rendering {split}", count, "scenes", progress) as bar:
            write(target, count, size, seed=world, split=split, progress=lambda done, _, bar=bar: bar.at(done))
    if format == "coco":
        with Progress("asking about val", val, "scenes", progress) as bar:
            write_concept_set(target, val, size, seed=seed + 1, split="val", progress=lambda done, _: bar.at(done))
    return counts


def train_teacher(
    name: str, out: Path, *, steps: int = 5000, batch_size: int = 8, lr: float = 1e-3, resume: bool = False,
    weights: Path | None = None,
) -> TrainedTeacher:  # fmt: skip
    """Train the bundled teacher ``name`` on scenes rendered on the fly and score it on held-out ones."""
    if name not in TEACHERS:
        raise UserError(f"no sandbox teacher is called {name!r}{did_you_mean(name, list(TEACHERS))}")
    return TEACHERS[name](out, steps, batch_size, lr, resume, weights)
