"""Which bytes of which source file the records of a store are of: a table beside them.

``rank{r}-sources.jsonl`` has lines of ``key``, of a record, and ``fingerprint``, its source's when it was cached, empty
while the record is renewed. The last line of a key counts, of several ranks that of the lowest. Stores of earlier
versions have no such table: of their records nothing is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..io import Appender


class Comparison(NamedTuple):
    """Keys of records whose source changed since it was cached, and of those that the table does not have."""

    changed: list[str]
    unknown: list[str]


class SourceTable:
    """The table of one store, or of several that are cached together. known: fingerprint by key, of all ranks."""

    def __init__(self, root: Path, rank: int = 0) -> None:
        """rank: of this process, which adds lines to a file of its own."""
        self._own = root / f"rank{rank}-sources.jsonl"
        self.known: dict[str, str] = {}
        for path in sorted(root.glob("rank*-sources.jsonl"), key=_rank, reverse=True):
            self.known.update(_read(path))

    def compare(self, now: Mapping[str, str]) -> Comparison:
        """now: today's fingerprint of the source of each record."""
        return Comparison(
            [key for key, found in now.items() if self.known.get(key, found) != found],
            [key for key in now if key not in self.known],
        )

    def add(self, entries: Mapping[str, str]) -> None:
        """Note fingerprints; they are on the disk when this returns."""
        if not entries:
            return
        torn = self._own.exists() and self._own.stat().st_size and not self._own.read_bytes().endswith(b"\n")
        lines = (json.dumps({"key": key, "fingerprint": found}) + "\n" for key, found in entries.items())
        with Appender(self._own) as file:
            file.write("\n" * bool(torn) + "".join(lines))
            file.sync()
        self.known.update(entries)


def _rank(path: Path) -> int:
    number = path.name.removeprefix("rank").partition("-")[0]
    return int(number) if number.isdecimal() else 0


def _read(path: Path) -> dict[str, str]:
    """The last fingerprint of each key; a line that a kill tore is passed over."""
    found: dict[str, str] = {}
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            key, fingerprint = entry["key"], entry["fingerprint"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(key, str) and isinstance(fingerprint, str):
            found[key] = fingerprint
    return found
