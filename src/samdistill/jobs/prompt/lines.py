"""List of the prompts of a cache, as JSON lines."""

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
from ..recording import Record


class PromptLines:
    """List of the prompts of a cache, as JSON lines. It is a context manager.

    The files are ``prompts.jsonl``, and ``prompts-rank{r}.jsonl`` of other processes. A line has key and view of an
    image, the kind of prompt (point, box, box+point) and for each object points (x, y), labels and box (xyxy) in pixels
    of the student's canvas, or null. A line is written once, before its record. Incomplete lines of a killed run are
    removed.

    Attributes:
        done: Names of the records that have a complete line, of every process.
    """

    def __init__(self, root: Path, rank: int, stale: Collection[str] = ()) -> None:
        """Read the existing lines.

        Args:
            root: Folder of the cache.
            rank: Rank of this process.
            stale: Names of records that are renewed. Their lines are removed.
        """
        make_folder(root)
        self.root, self.path = root, root / ("prompts.jsonl" if rank == 0 else f"prompts-rank{rank}.jsonl")
        self.done = set[str]()
        for path in sorted(root.glob("prompts*.jsonl"), key=lambda path: path != self.path):
            lines = _whole_lines(path, self.done, set(stale))
            if (path == self.path or stale) and path.read_bytes() != (content := b"".join(lines)):
                write_bytes(path, content, sync=True)

    def has(self, name: str) -> bool:
        """Whether the record ``name`` has a line."""
        return name in self.done

    def write(self, record: Record) -> None:
        """Write the line of a record, which is its note, unless it exists."""
        if record.name not in self.done:
            self.file.write(json.dumps(record.note).encode() + b"\n")
            self.done.add(record.name)

    def __enter__(self) -> PromptLines:
        self.file = Appender(self.path, "all before it is kept: make room and run again to resume")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.file:
            self.file.sync()


def _whole_lines(path: Path, done: set[str], stale: Collection[str]) -> list[bytes]:
    """Return the valid lines whose record is not in ``stale`` or ``done``, and add their records to ``done``."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
            name = record_key(str(entry["key"]), int(entry["view"]))
        except (ValueError, KeyError, TypeError):
            continue
        if line.endswith(b"\n") and name not in done and name not in stale:
            done.add(name)
            found.append(line)
    return found


def described(batch: ObjectBatch, row: int, view: int) -> dict[str, Any]:
    """Return the line of the image ``row`` of ``batch``."""
    group = next(group for group in batch.groups if row in group.rows.tolist())
    at, prompts = group.rows.tolist().index(row), group.prompts
    kinds = [name for name, value in (("box", prompts.boxes), ("point", prompts.points)) if value is not None]
    values = {name: _plain(prompts, name, at) for name in ("points", "labels", "boxes")}
    return {"key": batch.images.keys[row], "view": view, "kind": "+".join(kinds)} | values


def _plain(prompts: Prompts, name: str, row: int) -> list[Any] | None:
    value: torch.Tensor | None = getattr(prompts, name)
    return None if value is None else value[row].tolist()
