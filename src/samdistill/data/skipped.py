"""What is left out of the data, whatever the job and the verb: named, counted on the console, listed, and logged.

Sources call ``leave_out`` with what they find unusable, and so does whatever reads items from them. While a verb runs,
``reporting`` collects it all: each input once, in ``skipped.jsonl`` and the log of the run folder.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ..io import Appender, make_folder, write_lines

SHOWN = 10
"""Inputs that the console names; the others are only counted there."""
logger = logging.getLogger("samdistill")


class BadInput(NamedTuple):
    """An input that was left out, and why. Counted and listed, never lost."""

    key: str
    reason: str


class Skipped:
    """The inputs that one verb leaves out, each once.

    found: in the order in which they were found. stage: the verb. folder: of the run, or None for a verb that has none.
    rank: a further process (rank above 0) lists what it finds in ``skipped-rank{r}.jsonl``.
    """

    def __init__(self, stage: str, folder: Path | None, rank: int, keep: bool) -> None:
        """keep: what an earlier call of the same verb listed; else it is dropped, since it may have been mended."""
        self.found: dict[BadInput, None] = {}
        self.stage, self.folder, self._keep = stage, folder, keep
        self._list, self._log = skipped_file(rank), f"log_rank{rank}.txt"

    def add(self, inputs: Iterable[BadInput]) -> None:
        new = [bad for bad in dict.fromkeys(inputs) if bad not in self.found]
        for bad in new:
            self.found[bad] = None
            if len(self.found) <= SHOWN:
                logger.warning("left out: %s: %s", *bad)
        if new and self.folder is not None:
            self._write(self.folder, new)

    def _write(self, folder: Path, new: Iterable[BadInput]) -> None:
        make_folder(folder)
        self._forget(folder / self._list)
        time = datetime.now().strftime("%Y-%m-%d %H:%M:%S,000")
        with Appender(folder / self._list) as listed, Appender(folder / self._log) as log:
            listed.write("".join(json.dumps({"stage": self.stage, **bad._asdict()}) + "\n" for bad in new))
            log.write("".join(f"{time} WARNING {self.stage}: left out: {bad.key}: {bad.reason}\n" for bad in new))

    def _forget(self, path: Path) -> None:
        """Before the first line of this call, or at its end: one that is refused at once leaves the list as it was."""
        if not self._keep and path.is_file():
            write_lines(path, [line for line in read_skipped(path) if line.get("stage") != self.stage])
        self._keep = True

    def conclude(self) -> None:
        """Say how many there were, where the console did not name them all or a list has them."""
        if self.folder is not None:
            self._forget(self.folder / self._list)
        if self.found and (self.folder is not None or len(self.found) > SHOWN):
            where = "" if self.folder is None else f"; all are listed in {self.folder / self._list}"
            count = "1 input is" if len(self.found) == 1 else f"{len(self.found)} inputs are"
            logger.warning("%s: %s left out%s", self.stage, count, where)


_open: list[Skipped] = []


@contextmanager
def reporting(stage: str, folder: Path | None = None, rank: int = 0, *, resume: bool = False) -> Iterator[Skipped]:
    """Collect what is left out until the end, for one verb; inside another verb, for that one.

    resume: keep what this stage of the run listed before.
    """
    if _open:
        yield _open[-1]
        return
    collected = Skipped(stage, folder, rank, resume)
    _open.append(collected)
    try:
        yield collected
    finally:
        _open.remove(collected)
    collected.conclude()  # an error says enough of its own


def leave_out(inputs: Iterable[BadInput], *, seen_by_all: bool = False) -> None:
    """Name inputs that are not used. seen_by_all: every process of a run finds them, so the first one says so."""
    if seen_by_all and int(os.environ.get("RANK", 0)) != 0:
        return
    if _open:
        _open[-1].add(inputs)
    else:
        for bad in inputs:
            logger.warning("left out: %s: %s", *bad)


def skipped_file(rank: int = 0) -> str:
    """The list's name in a run folder."""
    return "skipped.jsonl" if rank == 0 else f"skipped-rank{rank}.jsonl"


def read_skipped(path: Path) -> list[dict[str, Any]]:
    """The lines of such a list: ``key``, ``reason`` and ``stage``. A line that a kill tore is left out."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"key", "reason"} <= entry.keys():
            found.append(entry)
    return found
