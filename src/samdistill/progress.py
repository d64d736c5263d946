"""The progress display of all commands."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A progress bar on a terminal; without a terminal, one line every ten seconds, so that logs stay readable.

    Args:
        title: Text before the bar.
        total: Number of items.
        unit: Name of the items in the plural.
        enabled: If False, nothing is shown.
    """

    def __init__(self, title: str, total: int, unit: str, enabled: bool = True) -> None:
        self.title, self.total, self.unit, self.enabled = title, total, unit, enabled
        self._done, self._printed, self._start = 0, 0.0, time.monotonic()
        self._bar: RichProgress | None = None
        if enabled and sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> Progress:
        self._printed = self._start = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.enabled and self._done:
            self._line()

    def _line(self) -> None:
        elapsed = time.monotonic() - self._start
        rate = self._done / max(elapsed, 1e-9)
        print(f"{self.title}: {self._done}/{self.total} {self.unit}, {rate:.1f}/s", file=sys.stderr, flush=True)

    def advance(self, count: int = 1) -> None:
        self.at(self._done + count)

    def at(self, done: int) -> None:
        """Set the number of finished items."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif self.enabled and time.monotonic() - self._printed > 10:
            self._printed = time.monotonic()
            self._line()
