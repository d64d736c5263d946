"""Report inputs that are left out: count them, name them on the console, and list them in the run folder.

Data sets and readers pass unusable inputs to ``leave_out``. While a command runs, ``reporting`` collects them and
writes each input once to ``skipped.jsonl`` and to the log of the run folder.
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
"""Number of inputs that are named on the console. Further inputs are only counted there."""
logger = logging.getLogger("samdistill")


class BadInput(NamedTuple):
    """An input that was left out.

    Attributes:
        key: Key of the image or video, or the name of a file or object.
        reason: Why it was left out, in one line.
    """

    key: str
    reason: str


class Skipped:
    """The inputs that one command leaves out, each once.

    Attributes:
        found: The inputs, in the order in which they were found.
        stage: Name of the command.
        folder: Run folder, or None for a command without one.
    """

    def __init__(self, stage: str, folder: Path | None, rank: int, keep: bool) -> None:
        """Start an empty list.

        Args:
            stage: Name of the command.
            folder: Run folder, or None.
            rank: Rank of this process. A rank above 0 writes to ``skipped-rank{r}.jsonl``.
            keep: Keep the entries of an earlier call of the same command. Otherwise they are removed, because those
                inputs may have been repaired.
        """
        self.found: dict[BadInput, None] = {}
        self.stage, self.folder, self._keep = stage, folder, keep
        self._list, self._log = skipped_file(rank), f"log_rank{rank}.txt"

    def add(self, inputs: Iterable[BadInput]) -> None:
        """Report inputs that were not reported before."""
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
        """Remove the entries of earlier calls of this command, once.

        This is done before the first entry is written, or in ``conclude``. A command that is refused before leaves the
        list unchanged.
        """
        if not self._keep and path.is_file():
            write_lines(path, [line for line in read_skipped(path) if line.get("stage") != self.stage])
        self._keep = True

    def conclude(self) -> None:
        """Log the number of inputs if a list was written or the console did not name all of them."""
        if self.folder is not None:
            self._forget(self.folder / self._list)
        if self.found and (self.folder is not None or len(self.found) > SHOWN):
            where = "" if self.folder is None else f"; all are listed in {self.folder / self._list}"
            count = "1 input is" if len(self.found) == 1 else f"{len(self.found)} inputs are"
            logger.warning("%s: %s left out%s", self.stage, count, where)


_open: list[Skipped] = []


@contextmanager
def reporting(stage: str, folder: Path | None = None, rank: int = 0, *, resume: bool = False) -> Iterator[Skipped]:
    """Collect the inputs that are left out during a command, and report their number at the end.

    Inside another ``reporting`` the inputs are added to the outer one.

    Args:
        stage: Name of the command.
        folder: Run folder for the list and the log, or None.
        rank: Rank of this process.
        resume: Keep the entries that an earlier call of this command listed.
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
    collected.conclude()  # not after an exception, which is reported by itself


def leave_out(inputs: Iterable[BadInput], *, seen_by_all: bool = False) -> None:
    """Report inputs that are not used.

    Args:
        inputs: The inputs and reasons.
        seen_by_all: Every process of the run finds these inputs, so that only rank 0 reports them.
    """
    if seen_by_all and int(os.environ.get("RANK", 0)) != 0:
        return
    if _open:
        _open[-1].add(inputs)
    else:
        for bad in inputs:
            logger.warning("left out: %s: %s", *bad)


def skipped_file(rank: int = 0) -> str:
    """Return the name of the list in a run folder."""
    return "skipped.jsonl" if rank == 0 else f"skipped-rank{rank}.jsonl"


def read_skipped(path: Path) -> list[dict[str, Any]]:
    """Read the entries of a list: ``key``, ``reason`` and ``stage``.

    Incomplete lines, which a killed process can leave, are ignored.
    """
    found = []
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"key", "reason"} <= entry.keys():
            found.append(entry)
    return found
