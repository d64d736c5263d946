"""Compute fingerprints of source files from their size and their first and last bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from .members import InputFile

_PIECE = 1 << 16
_AT_ONCE = 8


def file_digest(path: InputFile, piece: int = _PIECE) -> bytes:
    """Hash the size of a file and its first and last ``piece`` bytes.

    A file of at most ``2 * piece`` bytes is hashed completely. The name and the modification time are not included, so
    a copy has the same digest.

    Args:
        path: The file, or a member of a shard.
        piece: Number of bytes that are read at each end.

    Returns:
        A digest of 8 bytes (BLAKE2b).

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest.update(size.to_bytes(8, "little") + file.read(piece))
        if size > piece:
            file.seek(max(piece, size - piece))
            digest.update(file.read(piece))
    return digest.digest()


def combined(parts: Iterable[bytes]) -> str:
    """Hash digests in the given order to 16 hexadecimal digits."""
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


def fingerprints(ask: Callable[[str], str], keys: Iterable[str]) -> dict[str, str]:
    """Compute the fingerprint of each key with several threads.

    Args:
        ask: Returns the fingerprint of a key, or raises ``OSError``.
        keys: The keys.

    Returns:
        Key to fingerprint; the fingerprint is empty if ``ask`` raised ``OSError``.
    """

    def one(key: str) -> str:
        try:
            return ask(key)
        except OSError:
            return ""

    wanted = list(keys)
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # threads, because most of the time is spent waiting for the disk
        return dict(zip(wanted, pool.map(one, wanted), strict=True))
