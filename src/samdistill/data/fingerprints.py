"""What a source file holds, told cheaply: its size, its head and its tail."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_PIECE = 1 << 16
_AT_ONCE = 8


def file_digest(path: Path, piece: int = _PIECE) -> bytes:
    """8 bytes over the size of a file and its first and last ``piece`` bytes: a smaller one is read whole.

    Neither the name nor a time is part of it, so a copy has the same. Raises ``OSError``.
    """
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little") + file.read(piece))
        if size > piece:
            file.seek(max(piece, size - piece))
            digest.update(file.read(piece))
    return digest.digest()


def combined(parts: Iterable[bytes]) -> str:
    """16 hex digits over digests in their order."""
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


def fingerprints(ask: Callable[[str], str], keys: Iterable[str]) -> dict[str, str]:
    """What ``ask`` says of each key, several at a time; empty for a file that cannot be read."""

    def one(key: str) -> str:
        try:
            return ask(key)
        except OSError:
            return ""

    wanted = list(keys)
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # the disk is waited for, not the processor
        return dict(zip(wanted, pool.map(one, wanted), strict=True))
