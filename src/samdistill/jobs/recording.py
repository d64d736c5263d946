"""Writing a cache, whatever is cached: a job says what its records are, the rest is the same for all of them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from ..data import BadInput, record_key
from ..progress import Progress
from ..store import FeatureStore, FeatureStoreWriter, StoreSpec
from ..store.changes import Renewal
from ..types import UserError
from .caching import CacheCall, CacheReport, list_skipped, settled_codec, verify_files, verify_record


class Record(NamedTuple):
    """All that is kept of one view of an image, or of one frame of a video. tensors: by store; those of
    no store of the run are left. note: for the journal, where there is one."""

    name: str
    seed: int
    tensors: Mapping[str, Tensor]
    note: Any = None


class Block(NamedTuple):
    """Inputs that are computed together. names: the records that they give where nothing is wrong with them. about:
    what the source needs to compute them."""

    names: Sequence[str]
    about: Any


def view_blocks(keys: Sequence[str], views: int, size: int) -> list[Block]:
    """Blocks of ``size`` keys of each view; ``about`` is the view and its keys."""
    return [
        Block([record_key(key, view) for key in keys[start : start + size]], (view, keys[start : start + size]))
        for view in range(views)
        for start in range(0, len(keys), size)
    ]


class Computed(NamedTuple):
    """What came of a block."""

    records: Sequence[Record]
    bad: Sequence[BadInput] = ()


class Journal(Protocol):
    """A list that is kept beside the records; an entry is written before the record that it belongs to."""

    def has(self, name: str) -> bool: ...

    def write(self, record: Record) -> None: ...


class RecordSource(ABC):
    """What one job caches, for one process of a cache run.

    root: folder of the stores. specs: of each store, by its folder below ``root`` (empty for ``root`` itself). unit:
    what a progress bar counts.
    """

    unit: ClassVar[str] = "images"
    root: Path
    specs: Mapping[str, StoreSpec]

    @property
    @abstractmethod
    def problems(self) -> Sequence[BadInput]:
        """Inputs that this process leaves out before anything is computed."""

    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """This process's share, always cut in the same places: a resumed run then puts the same inputs into the same
        batch as an uninterrupted one, so its records are the same to the bit."""

    @abstractmethod
    def compute(self, blocks: Sequence[Block]) -> Iterator[Computed]:
        """The records of each block, in order, on the CPU."""

    @abstractmethod
    def fingerprints(self) -> Mapping[str, str]:
        """Of the file that each record of this process's share describes."""

    @abstractmethod
    def sample(self, store: str) -> Iterable[Tensor]:
        """Tensors of a store that a codec is fitted on, spread over the data set."""

    @abstractmethod
    def probe(self, done: Collection[str]) -> Iterator[Record]:
        """A sample of the records among ``done``, computed again."""

    def usable(self, records: int) -> bool:
        """Whether a run of one process left anything to train on."""
        return records > 0

    def journal(self, stale: Collection[str]) -> AbstractContextManager[Journal | None]:
        """The list beside the records. stale: records that are written again."""
        return nullcontext()


def write_records(source: RecordSource, call: CacheCall) -> CacheReport:
    """Write the records that are missing, renew those whose source changed, and verify where that is asked for.

    Raises ``UserError`` where the stores are of something else, where a record is damaged or differs from what is
    computed again, and where a run of one process leaves nothing to train on.
    """
    start, root, rank, world = time.monotonic(), source.root, call.rank, call.world
    codecs = {
        name: settled_codec(root / name, spec, rank, call.verify, lambda name=name: source.sample(name))
        for name, spec in source.specs.items()
    }
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(FeatureStoreWriter(root / name, spec, codecs[name], rank, world))
            for name, spec in source.specs.items()
        }
        cached = set[str]().union(*(writer.done for writer in writers.values()))
        renewal = Renewal(root, rank, world, source.fingerprints(), cached)
        for writer in writers.values():
            writer.expire(renewal.stale)
        journal = stack.enter_context(source.journal(renewal.stale))
        bad, written = _fill(source, writers, journal, call.progress and rank == 0)
        renewed = renewal.conclude(_in_all(writers.values()))
    skipped = list_skipped(root, rank, [*source.problems, *bad])
    stores = {name: FeatureStore(root / name, spec) for name, spec in source.specs.items()}
    records = min(map(len, stores.values()))
    if world == 1 and not source.usable(records):  # the other processes may do better than this one
        first = f"; the first: {skipped[0].key}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"{root}: not one input could be cached{first}")
    checked, worst = _verify(source, stores, rank, world) if call.verify else (0, 0.0)
    return CacheReport(
        store=str(root), codec=next(iter(stores.values())).spec.codec, records=records, written=written,
        bytes=sum(len(store) * store.bytes_per_record for store in stores.values()),
        bytes_per_record=sum(store.bytes_per_record for store in stores.values()), seconds=time.monotonic() - start,
        skipped=skipped, recovered=[line for writer in writers.values() for line in writer.recovered],
        verified=checked, worst_error=worst, renewed=renewed,
    )  # fmt: skip


def _in_all(writers: Iterable[FeatureStoreWriter]) -> set[str]:
    """Records that every store has."""
    return set.intersection(*(set(writer.done) for writer in writers))


def _fill(
    source: RecordSource, writers: Mapping[str, FeatureStoreWriter], journal: Journal | None, progress: bool
) -> tuple[list[BadInput], int]:
    """Write what is missing: inputs that turned out to be unusable, and the number of records written."""
    bad, written = list[BadInput](), 0

    def done(name: str) -> bool:
        return all(name in writer.done for writer in writers.values()) and (journal is None or journal.has(name))

    wanted = [block for block in source.blocks() if not all(map(done, block.names))]
    with Progress("caching", sum(len(block.names) for block in wanted), source.unit, progress) as bar:
        for block, found in zip(wanted, source.compute(wanted), strict=True):
            for record in found.records:
                if done(record.name):
                    continue
                if journal is not None:
                    journal.write(record)
                for store, writer in writers.items():
                    if record.name not in writer.done:
                        writer.write(record.name, record.seed, record.tensors[store])
                written += 1
            bad += found.bad
            bar.advance(len(block.names))
    return bad, written


def _verify(source: RecordSource, stores: Mapping[str, FeatureStore], rank: int, world: int) -> tuple[int, float]:
    """Checksums of all records, then a sample computed again: how many, and the worst relative difference.

    With several processes each one verifies its own files and inputs.
    """
    for store in stores.values():
        verify_files(store, rank, world)
    done = set.intersection(*(set(store) for store in stores.values()))
    checked, errors = 0, list[float]()
    for record in source.probe(done):
        checked += 1
        errors += [
            verify_record(store, store.codec, record.name, record.tensors[name]) for name, store in stores.items()
        ]
    return checked, max(errors, default=0.0)
