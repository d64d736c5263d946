"""``samdistill sandbox``: render a data set of synthetic images or videos."""

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
    """Format of a data set: its writer, the name of its items, and their default number per split."""

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
    """Render synthetic images or videos with exact masks as a data set.

    The training split has world ``seed`` and the validation split world ``seed + 1``, so they share no scene. An
    interrupted call can be repeated: files that exist are kept.

    Args:
        target: Output folder.
        train: Number of training images or videos. None means 2000 images or 64 videos.
        val: Number of validation images or videos. None means 128 images or 16 videos.
        size: Side of the square images in pixels.
        seed: Number of the world.
        format: ``sa1b`` (images and one JSON each), ``coco`` or ``sav`` (videos in the layout of SA-V). ``coco`` also
            writes ``concepts_val.json``, phrases for the validation images with their ground truth in the layout of
            SA-Co.
        progress: Show a progress bar.

    Returns:
        The number of images or videos per split.

    Raises:
        UserError: There is no such format, a number or the size is out of range, the folder has a split with other
            settings, or another process renders into it.

    Example:
        >>> import tempfile
        >>> render_sandbox(tempfile.mkdtemp(), train=2, val=1, size=64, progress=False)
        {'train': 2, 'val': 1}
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
