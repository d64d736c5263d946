"""Locks on folders that one process at a time writes. The operating system releases a lock when its process ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .errors import UserError
from .io import disk_errors, open_records

try:
    import fcntl
except ImportError:  # Windows has no advisory locks: two writers of one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

NAME = ".samdistill.lock"
_held: dict[Path, int] = {}
"""Lock files of this process, and the thread that holds each."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)


@contextmanager
def locked(folder: Path, doing: str, name: str = NAME) -> Iterator[None]:
    """Lock a folder for this thread. The same thread may lock it again in the body.

    The folder is created if it does not exist. Afterwards the lock file is removed, and so are folders that were
    created here and are empty.

    ``lockf`` on a separate file is used for two reasons. Forked loader workers inherit a ``flock`` and would hold it
    after the main process was killed. A ``lockf`` on a data file would end when this process closes any descriptor of
    it.

    Args:
        folder: The folder.
        doing: The command, for the message to other processes.
        name: Name of the lock file.

    Raises:
        UserError: Another process or thread holds the lock. The message names it. There is no waiting.
    """
    path = folder.resolve() / name
    holder = _held.get(path)
    if holder == threading.get_ident():
        yield
        return
    if holder is not None:
        raise UserError(f"{folder}: another thread of this process is writing here; wait for it or use another folder")
    with ExitStack() as stack:
        stack.enter_context(_folder(folder))
        _take(path, folder, doing, stack)
        _held[path] = threading.get_ident()
        stack.callback(_held.pop, path)
        yield


def _take(path: Path, folder: Path, doing: str, stack: ExitStack) -> None:
    """Lock the file that is at ``path`` now, because another process may remove it between opening and locking."""
    while True:
        with disk_errors(path):
            file = open_records(path)
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise UserError(f"{folder}: {_about(file.read())}") from None
            return  # some network file systems have no locks, so the folder is written without one
        try:
            same = os.fstat(file.fileno()).st_ino == os.stat(path).st_ino
        except FileNotFoundError:
            same = False
        if same:
            break
        file.close()
    stack.enter_context(file)
    stack.callback(path.unlink, missing_ok=True)
    about = {"pid": os.getpid(), "host": socket.gethostname(), "command": f"samdistill {doing}",
             "since": time.strftime("%Y-%m-%d %H:%M:%S")}  # fmt: skip
    with disk_errors(path):
        file.truncate(0)
        file.write(json.dumps(about).encode())


def _about(content: bytes) -> str:
    try:
        found = json.loads(content)
        who = f"{found['command']} (process {found['pid']} on {found['host']}, since {found['since']})"
    except (ValueError, TypeError, KeyError):  # the other process has not written its name yet
        who = "another process"
    return f"{who} is writing here; wait for it, stop it, or use another folder"


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Create the folder if it does not exist, and afterwards remove created folders that are empty."""
    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for place in made:
            try:
                place.rmdir()
            except OSError:
                break
