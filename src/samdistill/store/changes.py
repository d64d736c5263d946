"""Detect source files that changed after they were cached. ``cache`` renews their records, training refuses them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..types import UserError
from . import SourceTable

logger = logging.getLogger("samdistill")


class Renewal:
    """The records that a call of ``cache`` has to renew.

    Attributes:
        now: Current fingerprint of the source of each record.
        table: Fingerprints at the time of caching.
        stale: Keys of cached records whose source changed, and of records that an interrupted renewal left.
    """

    def __init__(self, root: Path, rank: int, world: int, now: Mapping[str, str], cached: Collection[str]) -> None:
        """Compare the sources with the table and mark the stale records in it.

        Args:
            root: Folder of the store, or of the stores that are cached together.
            rank: Rank of this process.
            world: Number of processes.
            now: Current fingerprint of the source of each record of this rank.
            cached: Keys of the cached records.

        Raises:
            UserError: Records must be renewed and there are several processes. A record may be in the file of another
                rank, so one process has to renew them.
        """
        self.now, self.table = now, SourceTable(root, rank)
        changed, unknown = self.table.compare(now)
        self.stale = [key for key in changed if key in cached]
        if self.stale and world > 1:
            raise UserError(
                f"{root}: {_changed(self.stale)}; renew them in one process, without --nproc, then go on with several"
            )
        warn_unknown(root, [key for key in unknown if key in cached])
        self.table.add({key: now[key] for key in (*changed, *unknown) if key not in cached})
        self.table.add(dict.fromkeys(self.stale, ""))

    def conclude(self, done: Collection[str]) -> int:
        """Enter the new fingerprints of stale records that are in ``done`` in the table, and return their number."""
        renewed = {key: self.now[key] for key in self.stale if key in done}
        self.table.add(renewed)
        return len(renewed)


def refuse_changed(root: Path, now: Mapping[str, str]) -> None:
    """Check that no cached source changed.

    Args:
        root: Folder of the store, or of the stores that are cached together.
        now: Current fingerprint of the source of each record.

    Raises:
        UserError: A source changed. The message names the first ones.
    """
    changed, unknown = SourceTable(root).compare(now)
    if changed:
        raise UserError(f"{root}: {_changed(changed)}; run `samdistill cache` with this config again, it renews them")
    warn_unknown(root, unknown)


def warn_unknown(root: Path, keys: Sequence[str]) -> None:
    """Log a warning about records without a fingerprint."""
    if keys:
        logger.warning(
            "%s: %d cached input(s), such as %s, have no fingerprint, as in caches of earlier versions, so it "
            "is not known whether they changed; delete the cache and cache again to be sure", root, len(keys), keys[0],
        )  # fmt: skip


def _changed(keys: Sequence[str]) -> str:
    some = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"{len(keys)} input(s) changed since they were cached ({some})"
