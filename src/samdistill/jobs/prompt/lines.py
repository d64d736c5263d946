"""The prompts that a cache of the prompt job belongs to, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ...data import ObjectBatch, record_key
from ...io import Appender, make_folder, write_bytes
from ...types import Prompts


class PromptLines:
    """The prompts that a cache belongs to, one JSON object a line; a context manager.

    ``prompts.jsonl``, and ``prompts-rank{r}.jsonl`` of further processes: key and view of an image, the kind of prompt
    (point, box, box+point), and for each object points (x, y), labels and box (left, top, right, bottom) in pixels of
    the student's canvas, null where there are none. A line is written before the records it belongs to, and comes once:
    what a killed run left torn is cut.

    done: (key, view) of every whole line of all processes.
    """

    def __init__(self, root: Path, rank: int, stale: Collection[str] = ()) -> None:
        """stale: records that are renewed; their lines are dropped, and written again."""
        make_folder(root)
        self.root, self.path = root, root / ("prompts.jsonl" if rank == 0 else f"prompts-rank{rank}.jsonl")
        self.done: set[tuple[str, int]] = set()
        for path in sorted(root.glob("prompts*.jsonl"), key=lambda path: path != self.path):
            lines = _whole_lines(path, self.done, set(stale))
            if (path == self.path or stale) and path.read_bytes() != (content := b"".join(lines)):
                write_bytes(path, content, sync=True)

    def write(self, batch: ObjectBatch, row: int, view: int) -> None:
        """The line of one image of ``batch``; nothing where it is there."""
        key = batch.images.keys[row]
        if (key, view) in self.done:
            return
        line = json.dumps({"key": key, "view": view, **_described(batch, row)}).encode() + b"\n"
        self.file.write(line)
        self.done.add((key, view))

    def __enter__(self) -> PromptLines:
        self.file = Appender(self.path, "all before it is kept: make room and run again to resume")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.file:
            self.file.sync()


def _whole_lines(path: Path, done: set[tuple[str, int]], stale: Collection[str]) -> list[bytes]:
    """Lines that can be read, whose record is not ``stale`` and whose view is not among ``done``, to which theirs are
    added."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
            place = str(entry["key"]), int(entry["view"])
        except (ValueError, KeyError, TypeError):
            continue
        if line.endswith(b"\n") and place not in done and record_key(*place) not in stale:
            done.add(place)
            found.append(line)
    return found


def _described(batch: ObjectBatch, row: int) -> dict[str, Any]:
    """The prompts about one image."""
    group = next(group for group in batch.groups if row in group.rows.tolist())
    at, prompts = group.rows.tolist().index(row), group.prompts
    kinds = [name for name, value in (("box", prompts.boxes), ("point", prompts.points)) if value is not None]
    values = {name: _plain(prompts, name, at) for name in ("points", "labels", "boxes")}
    return {"kind": "+".join(kinds)} | values


def _plain(prompts: Prompts, name: str, row: int) -> list[Any] | None:
    value: torch.Tensor | None = getattr(prompts, name)
    return None if value is None else value[row].tolist()
