"""Stopping at a step's end instead of in its middle."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_PRESS = 1.0
"""Seconds within which signals count as one: a terminal and a launcher may both deliver the same Ctrl-C."""

_WORKER_GRACE = 20
"""Seconds a loader worker lives on after a SIGTERM."""


class Interrupted(SystemExit):
    """The run stopped when asked to, its state saved in ``checkpoint``. Ends the process with code 130."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(130)
        self.checkpoint = checkpoint


class StopSignal:
    """Inside, the first SIGINT or SIGTERM sets ``asked``; a later one raises ``KeyboardInterrupt``.

    A signal that the process was started to ignore stays ignored: a shell script does that to SIGINT of what it runs
    in the background. Off the main thread Python delivers no signals: ``asked`` then stays False.
    """

    def __init__(self) -> None:
        self.asked = False
        self._first = 0.0

    def __enter__(self) -> StopSignal:
        wanted = heeded(_SIGNALS) if threading.current_thread() is threading.main_thread() else []
        self._before: dict[signal.Signals, Any] = {s: signal.signal(s, self._on) for s in wanted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def arrives(self, seconds: float = 15.0) -> bool:
        """Wait for a signal for a while; True when there was one."""
        end = time.monotonic() + seconds
        while not self.asked and time.monotonic() < end:
            time.sleep(0.05)
        return self.asked

    def _on(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._first > _ONE_PRESS:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._first = True, now


def heeded(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those of ``signals`` that this process does not ignore."""
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]


def outlive_signals(worker: int) -> None:
    """For loader workers, which a terminal or a scheduler signals too: serve the step that is being finished.

    SIGINT is ignored. SIGTERM kills after a grace, not at once, because multiprocessing also ends its children with it.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_WORKER_GRACE))
