"""Table of the source fingerprints of the records in a store.

``rank{r}-sources.jsonl`` has lines with ``key`` of a record and ``fingerprint`` of its source when it was cached. The
fingerprint is empty while the record is being renewed. The last line of a key is valid; of several ranks, that of the
lowest rank. Stores of earlier versions have no table, so the fingerprints of their records are unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..io import Appender


class Comparison(NamedTuple):
    """Result of a comparison with the current sources.

    Attributes:
        changed: Keys of records whose source changed after it was cached.
        unknown: Keys that are not in the table.
    """

    changed: list[str]
    unknown: list[str]


class SourceTable:
    """Fingerprints of one store, or of several that are cached together.

    Attributes:
        known: Fingerprint by key, from all ranks.
    """

    def __init__(self, root: Path, rank: int = 0) -> None:
        """Read the table.

        Args:
            root: Folder of the table.
            rank: Rank of this process, which appends to a file of its own.
        """
        self._own = root / f"rank{rank}-sources.jsonl"
        self.known: dict[str, str] = {}
        for path in sorted(root.glob("rank*-sources.jsonl"), key=_rank, reverse=True):
            self.known.update(_read(path))

    def compare(self, now: Mapping[str, str]) -> Comparison:
        """Compare the table with ``now``, the current fingerprint of the source of each record."""
        return Comparison(
            [key for key, found in now.items() if self.known.get(key, found) != found],
            [key for key in now if key not in self.known],
        )

    def add(self, entries: Mapping[str, str]) -> None:
        """Append fingerprints. They are on disk (fsync) when this returns."""
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
    """Return the last fingerprint of each key. Incomplete lines, which a killed process can leave, are ignored."""
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
