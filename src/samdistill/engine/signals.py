"""Stopping at a step's end instead of in its middle."""

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
"""Seconds within which signals count as one: a terminal and a launcher may both deliver the same Ctrl-C."""


class Interrupted(SystemExit):
    """The run stopped when asked to, its state saved in ``checkpoint``. Ends the process with code 130."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(INTERRUPTED)
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
