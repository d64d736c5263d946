"""Members of tar shards, read in place: listing the headers of a shard, and reading a byte range of it as a file."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple, TypeAlias

from .skipped import BadInput

ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
"""Suffixes of compressed archives, whose members have no byte range."""
COMPRESSED = "compressed archive; unpack it to .tar or files first"
MOST_OPEN = 256
"""Largest number of shards that a process keeps open. Common systems allow 1024 files to a process."""
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
_BUFFER = 1 << 16


class Entry(NamedTuple):
    """A regular file in a tar shard: its name without folders, and the byte range of its content."""

    name: str
    offset: int
    size: int


class Member(NamedTuple):
    """A member of a shard, which is opened and read like a ``Path``.

    Every process keeps one descriptor of a shard. Reads state their position, so threads and forked processes can share
    it. A shard whose size or modification time is not the listed one is not read.

    Attributes:
        shard: Path of the shard.
        state: Size and modification time in nanoseconds of the shard when it was listed.
        name: Name of the member without folders.
        offset: Position of its first byte in the shard.
        size: Number of its bytes.

    Example:
        >>> with member.open() as file:  # doctest: +SKIP
        ...     file.read(2)
        b'\\xff\\xd8'
    """

    shard: str
    state: tuple[int, int]
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    @property
    def suffix(self) -> str:
        return PurePath(self.name).suffix

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the member for reading. Only ``rb`` is possible.

        Raises:
            OSError: The shard is missing, or changed after it was listed. Reading raises it for a shard that ends
                inside the member.
        """
        if mode != "rb":
            raise ValueError(f"mode {mode!r}: a member of a shard is opened with 'rb'")
        handle = _handle(self.shard, self.state)
        if state_of(os.fstat(handle.descriptor)) != self.state:
            raise OSError("its shard changed after it was listed; start the command again")
        return io.BufferedReader(_Range(handle, self.offset, self.size), _BUFFER)  # type: ignore[return-value]

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return file.read()


InputFile: TypeAlias = Path | Member
"""A file of a data set. Both forms have ``open``, ``read_bytes``, ``name``, ``suffix`` and ``str``."""


def state_of(found: os.stat_result) -> tuple[int, int]:
    """Return the size and the modification time in nanoseconds, which change when a shard is written again."""
    return found.st_size, found.st_mtime_ns


class _Handle:
    """A descriptor that is closed when the last reader has dropped it, which can be after it left the cache."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(MOST_OPEN)
def _handle(path: str, state: tuple[int, int]) -> _Handle:
    """Open a shard, once in a process for every state in which it was listed."""
    try:
        return _Handle(path)
    except FileNotFoundError:
        raise OSError("its shard vanished after it was listed; put it back or start the command again") from None


class _Range(io.RawIOBase):
    """A byte range of an open shard."""

    def __init__(self, handle: _Handle, start: int, size: int) -> None:
        self._handle, self._start, self._size, self._at = handle, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError("seek to a position before the file")
        self._at = at
        return at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        content = os.pread(self._handle.descriptor, count, self._start + self._at)
        if not content:
            raise OSError("its shard ends inside this member")
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def scan(path: str, size: int, problems: list[BadInput], label: str | None = None) -> Iterator[Entry]:
    """List the regular files of a tar shard. Only headers are read.

    Byte ranges without a readable member are reported, and reading continues after them. Hidden files are left out.

    Args:
        path: The shard.
        size: Number of its bytes.
        problems: Receives what cannot be read.
        label: Name of the shard in ``problems``. None is ``path``.

    Raises:
        OSError: The system cannot read the shard.
    """
    end, label = 0, label or path
    try:
        with open(path, "rb") as file:
            if file.read(8).startswith(_MAGIC):
                problems.append(BadInput(label, COMPRESSED))
                return
        # without ignore_zeros tarfile stops at a damaged header without an error
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            for member in tar:
                _gap(path, label, end, member.offset, problems)
                end = tar.offset
                name = os.path.basename(member.name)
                if member.offset_data + member.size > size:
                    problems.append(BadInput(f"{label}:{member.name}", "shard ends inside this member"))
                elif member.isreg() and not member.issparse() and not name.startswith("."):
                    yield Entry(name, member.offset_data, member.size)
    except tarfile.TarError as error:
        if end <= size:
            problems.append(BadInput(label, f"not readable as tar beyond byte {end}: {error}"))
        return
    _gap(path, label, end, size, problems)


def _gap(path: str, label: str, start: int, stop: int, problems: list[BadInput]) -> None:
    """Report the bytes between two members unless they are zero padding."""
    if start >= stop:
        return
    with open(path, "rb") as file:
        file.seek(start)
        while (left := stop - file.tell()) > 0:
            if any(file.read(min(left, 1 << 20))):
                problems.append(BadInput(label, f"bytes {start} to {stop} hold no readable member (damaged header)"))
                return
