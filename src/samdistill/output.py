"""Standard output that may be on a full disk, or whose reader has gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class OutputLost(Exception):
    """Standard output cannot be written, because of ``cause``. No ``OSError``: libraries swallow those."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Checked:
    """A stream that raises ``OutputLost``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputLost(error) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputLost(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def checked_output() -> Iterator[None]:
    """Inside, and on leaving, what cannot be written to standard output raises ``OutputLost``.

    Names of files that are not UTF-8 are printed escaped.
    """
    stream = sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    checked = _Checked(stream)
    sys.stdout = checked  # type: ignore[assignment]
    try:
        try:
            yield
        finally:
            checked.flush()
    except OutputLost:
        with suppress(OSError, ValueError):  # Python would report what is left once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise
    finally:
        sys.stdout = stream
