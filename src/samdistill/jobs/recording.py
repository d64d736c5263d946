"""Writing of any cache. A job provides a ``RecordSource``; the rest is common to all jobs."""

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
    """Everything that is stored for one view of an image, or for one video frame.

    Attributes:
        name: Name of the record.
        seed: Augmentation seed of the view.
        tensors: Tensors by store. Those of other stores are ignored.
        note: Entry in the journal, if there is one.
    """

    name: str
    seed: int
    tensors: Mapping[str, Tensor]
    note: Any = None


class Block(NamedTuple):
    """Inputs that are computed as one batch.

    Attributes:
        names: Names of the records, if all inputs are usable.
        about: What the source needs to compute them.
    """

    names: Sequence[str]
    about: Any


def view_blocks(keys: Sequence[str], views: int, size: int) -> list[Block]:
    """Return blocks of ``size`` keys of each view. ``about`` is the view and its keys."""
    return [
        Block([record_key(key, view) for key in keys[start : start + size]], (view, keys[start : start + size]))
        for view in range(views)
        for start in range(0, len(keys), size)
    ]


class Computed(NamedTuple):
    """Records of a block, and its unusable inputs."""

    records: Sequence[Record]
    bad: Sequence[BadInput] = ()


class Journal(Protocol):
    """A list in the folder of the cache. An entry is written before its record."""

    def has(self, name: str) -> bool: ...

    def write(self, record: Record) -> None: ...


class RecordSource(ABC):
    """Base class of what a job caches, for one process.

    Attributes:
        unit: What the progress bar counts.
        root: Root of the cache.
        specs: Specifications of the stores, by folder below ``root``. The empty string is ``root`` itself.
    """

    unit: ClassVar[str] = "images"
    root: Path
    specs: Mapping[str, StoreSpec]

    @property
    @abstractmethod
    def problems(self) -> Sequence[BadInput]:
        """Inputs that are skipped before anything is computed."""

    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """Return the blocks of this process.

        Their boundaries do not depend on what is cached. A resumed run then computes the same batches as an
        uninterrupted one, and its records are equal bit for bit.
        """

    @abstractmethod
    def compute(self, blocks: Sequence[Block]) -> Iterator[Computed]:
        """Yield the records of each block, in order, on the CPU."""

    @abstractmethod
    def fingerprints(self) -> Mapping[str, str]:
        """Return the fingerprint of the source file of each record of this process."""

    @abstractmethod
    def sample(self, store: str) -> Iterable[Tensor]:
        """Return tensors of a store to fit a codec on, spread over the data set."""

    @abstractmethod
    def probe(self, done: Collection[str]) -> Iterator[Record]:
        """Compute a sample of the records in ``done`` again."""

    def usable(self, records: int) -> bool:
        """Whether a run of one process has cached anything to train on."""
        return records > 0

    def journal(self, stale: Collection[str]) -> AbstractContextManager[Journal | None]:
        """Return a context manager that opens the journal, or None.

        Args:
            stale: Names of records that are written again.
        """
        return nullcontext()


def write_records(source: RecordSource, call: CacheCall) -> CacheReport:
    """Write missing records, renew those whose source has changed, and verify them with ``call.verify``.

    Raises:
        UserError: A store has another specification, a record is damaged or differs from the teacher's output, or a run
            of one process has nothing to train on.
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
    if world == 1 and not source.usable(records):  # other processes may have usable inputs
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
    """Return the names of the records that every store has."""
    return set.intersection(*(set(writer.done) for writer in writers))


def _fill(
    source: RecordSource, writers: Mapping[str, FeatureStoreWriter], journal: Journal | None, progress: bool
) -> tuple[list[BadInput], int]:
    """Write missing records. Return the unusable inputs and the number of records written."""
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
    """Verify all checksums, and compare a sample of records with the teacher's output.

    With several processes, each verifies its own files and inputs.

    Returns:
        Number of compared records and the largest relative difference.
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
