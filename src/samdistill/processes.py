"""How a command ends when it is asked to, and a rank when its launcher is gone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

INTERRUPTED = 130
"""Exit code of a command that SIGINT or SIGTERM ended."""
INTERRUPTION = "interrupted; what was finished is kept, the same command goes on"
GRACE = 120
"""Seconds the ranks have to finish their step and save after a signal, before they are killed."""
LAUNCHER = "SAMDISTILL_LAUNCHER"
"""Environment variable with the process id of the launcher."""
_LOOK = 1.0
_WORKER_GRACE = 20
"""Seconds a loader worker lives on after a SIGTERM."""


def heeded(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those of ``signals`` that this process does not ignore."""
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises ``KeyboardInterrupt`` as Ctrl-C does, unless the process was started to ignore it.

    A training puts its own handler over it. Of several ranks none gets this one: a rank that waits in native code for
    another one, which has failed, would never come to run it.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # Python delivers signals to that one alone
    if "LOCAL_RANK" in os.environ or not main or not heeded([signal.SIGTERM]):
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """Send this process SIGTERM when its parent is gone, and SIGKILL ``GRACE`` seconds later.

    A launcher that is killed cannot stop its ranks, which would train on unseen.
    """
    parent = int(os.environ.pop(LAUNCHER, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def outlive_signals(worker: int) -> None:
    """For loader workers, which a terminal or a scheduler signals too: serve the step that is being finished.

    SIGINT is ignored. SIGTERM kills after a grace, not at once, because multiprocessing also ends its children with it.
    Where the main process ends first, a thread of this one that hands out shared memory loses its connection, and would
    print a traceback.
    """
    sys.excepthook = _without_lost_connections
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_WORKER_GRACE))


def _without_lost_connections(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """``sys.excepthook`` of a loader worker: the main process is gone, and says itself why."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
