"""Signals: how a command ends when it is interrupted, and how a rank ends when its launcher has ended."""

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
"""Exit code of a command that was ended by SIGINT or SIGTERM."""
INTERRUPTION = "interrupted; what was finished is kept, the same command goes on"
GRACE = 120
"""Seconds in which the ranks finish their step and save after a signal, before they are killed."""
LAUNCHER = "SAMDISTILL_LAUNCHER"
"""Environment variable with the process id of the launcher."""
_LOOK = 1.0
"""Seconds between two checks of the parent process."""
_WORKER_GRACE = 20
"""Seconds in which a loader worker continues after SIGTERM."""


def heeded(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return those of ``signals`` that this process does not ignore."""
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` in the body on SIGTERM, as on Ctrl-C.

    Nothing changes if the process was started with SIGTERM ignored. Training installs its own handler in the body. A
    rank of several does not get this handler: if it waits in native code for a rank that has failed, Python would never
    run the handler.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # only this thread can handle signals
    if "LOCAL_RANK" in os.environ or not main or not heeded([signal.SIGTERM]):
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """Send SIGTERM to this process when its parent has ended, and SIGKILL ``GRACE`` seconds later.

    A launcher that is killed cannot stop its ranks. Without this they would continue to train.
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
    """Keep a loader worker alive for the step that is being finished after a signal.

    Terminals and schedulers send signals to workers too. SIGINT is ignored. SIGTERM ends the worker after
    ``_WORKER_GRACE`` seconds. It is not ignored, because multiprocessing also ends its children with it. If the main
    process ends first, the thread that shares memory loses its connection; its traceback is suppressed.

    Args:
        worker: Number of the worker, not used.
    """
    sys.excepthook = _without_lost_connections
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_WORKER_GRACE))


def _without_lost_connections(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """``sys.excepthook`` of a loader worker, which ignores lost connections to the main process."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
