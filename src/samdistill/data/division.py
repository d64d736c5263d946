"""Reproducible subsets and splits of keys, by a hash of the key or by a list."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from ..reading import one_line
from ..types import UserError


def key_share(key: str, salt: str) -> float:
    """Return a number in [0, 1) that depends on the key and the salt only, and is the same on every platform."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{key}".encode()).digest()[:8], "big") / 2**64


def subset(keys: Collection[str], fraction: float) -> list[str]:
    """Select about ``fraction`` of the keys, at least one, by a hash of the key.

    Returns:
        The selected keys, sorted. The keys for a smaller fraction are a subset of those for a larger one.
    """
    if fraction >= 1 or not keys:
        return sorted(keys)
    return _below(keys, fraction, "subset") or [min(keys, key=lambda key: key_share(key, "subset"))]


def split_keys(keys: Collection[str], fraction: float) -> tuple[list[str], list[str]]:
    """Divide keys into training and held-out keys by a hash of the key.

    Adding keys does not move existing keys, apart from the exception below.

    Args:
        keys: The keys.
        fraction: Fraction of held-out keys. With 0 < fraction < 1 and at least two keys, both sides get at least one.

    Returns:
        Training keys and held-out keys, sorted.
    """
    held_out = set(_below(keys, fraction, "split"))
    if len(keys) > 1 and 0 < fraction < 1:
        ordered = sorted(keys, key=lambda key: key_share(key, "split"))
        held_out.add(ordered[0])
        if len(held_out) == len(keys):
            held_out.remove(ordered[-1])
    return sorted(set(keys) - held_out), sorted(held_out)


def _below(keys: Collection[str], fraction: float, salt: str) -> list[str]:
    return sorted(key for key in keys if key_share(key, salt) < fraction)


def read_keys(path: Path, known: Collection[str]) -> list[str]:
    """Read keys from a text file with one key per line.

    Returns:
        The keys, sorted.

    Raises:
        UserError: The file cannot be read, is empty, or has a key that is not in ``known``.
    """
    try:
        wanted = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.ids: cannot read {path}: {one_line(error)}") from None
    unknown = sorted(wanted - set(known))
    if unknown:
        some = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        like = f"; keys look like {min(known)!r}" if known else ""
        raise UserError(f"{path}: {len(unknown)} of {len(wanted)} ids are not in the data set: {some}{like}")
    if not wanted:
        raise UserError(f"{path}: holds no id; write one key a line")
    return sorted(wanted)
