"""``samdistill sandbox``: render a data set, train a bundled teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..io import as_path
from ..locks import locked
from ..progress import Progress
from ..registry import did_you_mean
from ..types import UserError
from .write import write_coco, write_concept_set, write_sa1b
from .write_videos import write_sav


@dataclass(frozen=True)
class Layout:
    """How a split is written, what it consists of, and its default number of these."""

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
