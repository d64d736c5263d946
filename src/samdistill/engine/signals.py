"""Signal handling that stops training at the end of a step."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ..processes import INTERRUPTED, heeded

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_PRESS = 1.0
"""Signals within this many seconds count as one, because a terminal and a launcher may both deliver the same Ctrl-C."""


class Interrupted(SystemExit):
    """The run was interrupted and its state saved in ``checkpoint``. The exit code is 130."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(INTERRUPTED)
        self.checkpoint = checkpoint


class StopSignal:
    """Context in which the first SIGINT or SIGTERM sets ``asked``, and a later one raises ``KeyboardInterrupt``.

    Signals that the process was started to ignore stay ignored. Shells do this to SIGINT of background jobs in scripts.
    Python handles signals in the main thread only; in other threads ``asked`` stays False.
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
        """Wait up to ``seconds`` for a signal, and return whether there was one."""
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
