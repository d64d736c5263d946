"""Images and videos that changed since they were cached: ``cache`` renews their records, training refuses them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..types import UserError
from . import SourceTable

logger = logging.getLogger("samdistill")


class Renewal:
    """What a call of ``cache`` has to write anew.

    root: folder of the store, or of those that are cached together. now: fingerprint of the source of each record that
    this rank is to have. cached: keys of the records that are there. stale: those of them whose source changed, and
    those that an interrupted renewal left.
    """

    def __init__(self, root: Path, rank: int, world: int, now: Mapping[str, str], cached: Collection[str]) -> None:
        """Raises ``UserError`` where several processes would have to renew: a record may be in the file of another."""
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
        """Note what was renewed, of the records that are ``done`` now; returns how many."""
        renewed = {key: self.now[key] for key in self.stale if key in done}
        self.table.add(renewed)
        return len(renewed)


def refuse_changed(root: Path, now: Mapping[str, str]) -> None:
    """``UserError`` that names records whose source is no longer what was cached. now: as in ``Renewal``."""
    changed, unknown = SourceTable(root).compare(now)
    if changed:
        raise UserError(f"{root}: {_changed(changed)}; run `samdistill cache` with this config again, it renews them")
    warn_unknown(root, unknown)


def warn_unknown(root: Path, keys: Sequence[str]) -> None:
    if keys:
        logger.warning(
            "%s: %d cached input(s), such as %s, have no fingerprint, as in caches of earlier versions: whether they "
            "changed since is not known; delete the cache and cache again to be sure", root, len(keys), keys[0],
        )  # fmt: skip


def _changed(keys: Sequence[str]) -> str:
    some = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"{len(keys)} input(s) changed since they were cached ({some})"
