"""Handle errors of standard output, such as a full disk or a closed pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class OutputLost(Exception):
    """Standard output cannot be written because of ``cause``.

    It is not an ``OSError``, because libraries catch those.
    """

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Checked:
    """A stream that raises ``OutputLost`` for errors while writing."""

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
    """Raise ``OutputLost`` if standard output cannot be written, in the body or when it is flushed at the end.

    File names that are not UTF-8 are printed with escapes.
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
        with suppress(OSError, ValueError):  # else Python reports the unwritten rest again when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise
    finally:
        sys.stdout = stream
