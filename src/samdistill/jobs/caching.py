"""Common parts of the caches of all jobs: checks of stores, lists of skipped inputs, and verification."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ..config.parts import CachedRun
from ..data import BadInput, Source, leave_out
from ..data.videos import VideoSource
from ..io import write_lines
from ..reading import read_json_lines
from ..report import human_bytes
from ..store import Codec, FeatureStore, Problem, StoreSpec, make_codec, stored_codec
from ..store.spec import MANIFEST, Manifest
from ..types import UserError

Specs = Mapping[str, StoreSpec]
"""Specifications of the stores of a cache, by folder below its root. The empty string is the root itself."""


def refuse_online(config: CachedRun) -> None:
    """Raise ``UserError`` if the teacher runs during training, so that there is nothing to cache."""
    if config.online:
        raise UserError(
            "cache.mode=online: the teacher runs while the student trains, there is nothing to cache; "
            "set cache.mode=stored to train from a cache"
        )


def planned(online: bool, size: int, text: str) -> str:
    """Return the line of ``plan`` about the cache.

    Args:
        online: The teacher runs during training.
        size: Bytes of the cache.
        text: Description of a cache with this size.
    """
    return f"{human_bytes(size)}: {'the teacher runs while the student trains' if online else text}"


def is_cached(root: Path, specs: Specs) -> bool:
    """Whether a cache exists, complete or not."""
    return all((root / name / MANIFEST).is_file() for name in specs)


def open_stores(root: Path, specs: Specs, what: str = "features") -> dict[str, FeatureStore]:
    """Open the stores of a run without reading weights of the teacher.

    Tap, shape, image size, transform and codec are compared with ``specs``, the teacher is not.

    Args:
        root: Root of the cache.
        specs: Specifications, with any teacher.
        what: What is cached, for the error message.

    Raises:
        UserError: There is no cache, or a store has another specification.
    """
    if not is_cached(root, specs):
        raise UserError(f"{root}: no cached {what} here; run `samdistill cache` with this config first")
    made_with = {name: Manifest.load(root / name).spec.teacher for name in specs}
    return {name: FeatureStore(root / name, replace(spec, teacher=made_with[name])) for name, spec in specs.items()}


def prove(root: Path, specs: Specs) -> None:
    """Raise ``UserError`` unless the stores were made by the teacher of ``specs``, which has its fingerprint."""
    for name, spec in specs.items():
        Manifest.load(root / name).require(root / name, spec)


def refuse_missing(root: Path, missing: Sequence[str], total: int) -> None:
    """Raise ``UserError`` if views are neither cached nor listed as skipped.

    Args:
        root: Root of the store.
        missing: Keys of the missing records.
        total: Number of records of a complete cache.
    """
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{root}: {len(missing)} of {total} views are not cached ({some}); run `samdistill cache` with this config "
            "again, it resumes"
        )


def skipped_path(store_root: Path, rank: int) -> Path:
    """Return the path of a rank's list of skipped inputs."""
    return store_root / f"rank{rank}-skipped.jsonl"


def left_out_of(store_root: Path, source: Source | VideoSource) -> dict[str, BadInput]:
    """Return the inputs that the cache listed as unusable, by key, and report them.

    Problems that the data set itself reports, such as a second file with the same name, are not included.

    Raises:
        UserError: A list is damaged.
    """
    found = [
        bad
        for path in sorted(store_root.glob("rank*-skipped.jsonl"))
        for bad in read_json_lines(path, BadInput, "not a list of skipped inputs, delete it and cache again")
    ]
    left = {bad.key: bad for bad in found if bad not in source.problems}
    leave_out([left[key] for key in source.keys if key in left], seen_by_all=True)
    return left


T = TypeVar("T")
WORST_ERROR = 0.01
"""Largest relative difference between a record and the teacher's output for the same image, both after the codec."""
FIT_IMAGES = 256
"""Number of images or video frames that a PCA basis is fitted on. They are spread evenly over the data set."""


@dataclass(frozen=True)
class CacheCall:
    """Arguments of ``cache``.

    Attributes:
        rank: Rank of this process.
        world: Number of processes.
        verify: Compare records with the teacher's output.
        device: Device of the teacher.
        progress: Show a progress bar.
        layout: One of ``Job.layouts``.
    """

    rank: int = 0
    world: int = 1
    verify: bool = False
    device: str = "cpu"
    progress: bool = True
    layout: str = "store"


@dataclass(frozen=True)
class CacheReport:
    """Result of ``cache``. A record is everything that is stored for one view of an image, or for one video frame.

    Attributes:
        store: Root of the cache.
        codec: Name of the codec.
        records: Number of records in the cache.
        written: Records written by this call.
        bytes: Bytes of the values files of all ranks.
        bytes_per_record: Bytes of one record.
        seconds: Duration.
        skipped: Unusable inputs.
        recovered: One line for each file with an incomplete end, which was cut and written again.
        verified: Records compared with the teacher's output.
        worst_error: Largest relative difference among these.
        renewed: Written records whose image or video had changed.
    """

    store: str
    codec: str
    records: int
    written: int
    bytes: int
    bytes_per_record: int
    seconds: float
    skipped: list[BadInput] = field(default_factory=list)
    recovered: list[str] = field(default_factory=list)
    verified: int = 0
    worst_error: float = 0.0
    renewed: int = 0

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain values for JSON."""
        return asdict(self) | {"skipped": [bad._asdict() for bad in self.skipped]}


def list_skipped(root: Path, rank: int, skipped: Iterable[BadInput]) -> list[BadInput]:
    """Write this rank's list of skipped inputs, without repeats, to the folder of the store, and return it."""
    found = list(dict.fromkeys(skipped))
    leave_out(found)
    write_lines(skipped_path(root, rank), (bad._asdict() for bad in found))
    return found


def refuse_damage(root: Path, problems: Sequence[Problem]) -> None:
    """Raise ``UserError`` if there are problems."""
    if problems:
        some = "; ".join(map(str, problems[:5])) + ("; ..." if len(problems) > 5 else "")
        raise UserError(f"{root}: {len(problems)} damaged record(s): {some}")


def settled_codec(
    root: Path, spec: StoreSpec, rank: int, verify: bool, sample: Callable[[], Iterable[Tensor]]
) -> Codec:  # fmt: skip
    """Return the codec of a new or existing store.

    Rank 0 fits a codec that is learned from data on the maps of ``sample``. Other ranks wait for the store.

    Raises:
        UserError: The store has another specification, or with ``verify`` a record is damaged.
    """
    stored = stored_codec(root)
    if stored is not None:
        store = FeatureStore(root, spec)  # raises for another teacher, transform, size or codec, before any work
        if verify:  # before the writer removes damaged records at the end
            refuse_damage(root, [problem for problem in store.verify() if problem.key is not None])
        return stored
    codec = make_codec(spec.codec, spec.shape)
    if codec.fitted:
        return codec
    if rank == 0:
        codec.fit(sample())
        return codec
    return wait_for(lambda: stored_codec(root), root, "store")


def verify_files(store: FeatureStore, rank: int, world: int) -> None:
    """Verify the checksums of all records, or with several ranks only of this one's, since others may still write."""
    refuse_damage(store.root, [p for p in store.verify() if world == 1 or p.file.startswith(f"rank{rank}-")])


def verify_record(store: FeatureStore, codec: Codec, name: str, feature: Tensor) -> float:
    """Compare a record with its feature computed again, both after the codec, whose loss therefore does not count.

    Returns:
        Relative L2 difference.

    Raises:
        UserError: It is above ``WORST_ERROR``.
    """
    stored, again = store.read(name).features, codec.decode(codec.encode(feature))
    error = float((stored - again).norm() / again.norm().clamp(min=1e-12))
    if not error <= WORST_ERROR:
        raise UserError(f"{store.root}: record {name!r} differs from the teacher's output by {error:.1%}")
    return error


def wait_for(found: Callable[[], T | None], root: Path, what: str, timeout: float = 7200.0) -> T:
    """Poll ``found`` until rank 0 has made ``what``.

    Raises:
        UserError: It does not exist after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while (value := found()) is None:
        if time.monotonic() > deadline:
            raise UserError(f"{root}: rank 0 made no {what} within {timeout / 3600:g} hours")
        time.sleep(0.5)
    return value
