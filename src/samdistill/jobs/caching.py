"""What the caches of all jobs share: the order of the work, what is listed, and what is reported."""

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
"""Of the stores that are cached together, by folder below their root; empty for the root itself."""


def refuse_online(config: CachedRun) -> None:
    """``UserError`` where there is nothing to write."""
    if config.online:
        raise UserError(
            "cache.mode=online: the teacher runs while the student trains, there is nothing to cache; "
            "set cache.mode=stored to train from a cache"
        )


def planned(online: bool, size: int, text: str) -> str:
    """The line of ``plan`` about the cache. text: what its ``size`` bytes are."""
    return f"{human_bytes(size)}: {'the teacher runs while the student trains' if online else text}"


def is_cached(root: Path, specs: Specs) -> bool:
    """Whether there is a cache, complete or not."""
    return all((root / name / MANIFEST).is_file() for name in specs)


def open_stores(root: Path, specs: Specs, what: str = "features") -> dict[str, FeatureStore]:
    """The run's stores, their taps, shapes, size, transform and codec held against the config: no weights are read.

    specs: of any teacher. Raises ``UserError`` where there are none, or they are of something else.
    """
    if not is_cached(root, specs):
        raise UserError(f"{root}: no cached {what} here; run `samdistill cache` with this config first")
    made_with = {name: Manifest.load(root / name).spec.teacher for name in specs}
    return {name: FeatureStore(root / name, replace(spec, teacher=made_with[name])) for name, spec in specs.items()}


def prove(root: Path, specs: Specs) -> None:
    """``UserError`` unless the stores are of the teacher of ``specs``: its weights must be those that were cached."""
    for name, spec in specs.items():
        Manifest.load(root / name).require(root / name, spec)


def refuse_missing(root: Path, missing: Sequence[str], total: int) -> None:
    """``UserError`` where a cache lacks views that it does not list as skipped. missing: their keys."""
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{root}: {len(missing)} of {total} views are not cached ({some}); run `samdistill cache` with this config "
            "again, it resumes"
        )


def skipped_path(store_root: Path, rank: int) -> Path:
    return store_root / f"rank{rank}-skipped.jsonl"


def left_out_of(store_root: Path, source: Source | VideoSource) -> dict[str, BadInput]:
    """What the cache listed as unusable, by key, which is named here too; not what listing the data set found, such as
    a second file of a name. Raises ``UserError`` for a list that is damaged."""
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
"""Largest relative difference between a record and the teacher's answer to the same image, both after the codec."""
FIT_IMAGES = 256
"""Images, or frames of videos, a PCA basis is fitted on, spread evenly over the data set."""


@dataclass(frozen=True)
class CacheCall:
    """How ``cache`` was called. rank, world: this process's share. verify: also hold records against the teacher.
    layout: one of ``Job.layouts``."""

    rank: int = 0
    world: int = 1
    verify: bool = False
    device: str = "cpu"
    progress: bool = True
    layout: str = "store"


@dataclass(frozen=True)
class CacheReport:
    """What a cache run did. bytes counts the values files of all ranks; skipped lists unreadable inputs.

    A record is all that is kept of one view of one image, or of one frame of a video. recovered: one line for each
    file whose torn end, left by a kill or a power cut, was cut and written again. renewed: records, among those
    ``written``, whose image or video had changed.
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
        return asdict(self) | {"skipped": [bad._asdict() for bad in self.skipped]}


def list_skipped(root: Path, rank: int, skipped: Iterable[BadInput]) -> list[BadInput]:
    """Write this rank's list of inputs that were left out, each once, beside the records, and return it."""
    found = list(dict.fromkeys(skipped))
    leave_out(found)
    write_lines(skipped_path(root, rank), (bad._asdict() for bad in found))
    return found


def refuse_damage(root: Path, problems: Sequence[Problem]) -> None:
    if problems:
        some = "; ".join(map(str, problems[:5])) + ("; ..." if len(problems) > 5 else "")
        raise UserError(f"{root}: {len(problems)} damaged record(s): {some}")


def settled_codec(
    root: Path, spec: StoreSpec, rank: int, verify: bool, sample: Callable[[], Iterable[Tensor]]
) -> Codec:  # fmt: skip
    """The codec of a store that may be there already. One that learns from data is fitted by rank 0, on the maps that
    ``sample`` gives; the others wait until it made the store."""
    stored = stored_codec(root)
    if stored is not None:
        store = FeatureStore(root, spec)  # refuses another teacher, transform, size or codec before any work is done
        if verify:  # before the writer cuts and mends the youngest records, as it does after a power cut
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
    """Checksums of all records; with several ranks of this one's, since others may still be writing theirs."""
    refuse_damage(store.root, [p for p in store.verify() if world == 1 or p.file.startswith(f"rank{rank}-")])


def verify_record(store: FeatureStore, codec: Codec, name: str, feature: Tensor) -> float:
    """Relative L2 difference between a record and the same feature computed again, both after the codec, so that its
    own loss does not count. Raises ``UserError`` where it is above ``WORST_ERROR``."""
    stored, again = store.read(name).features, codec.decode(codec.encode(feature))
    error = float((stored - again).norm() / again.norm().clamp(min=1e-12))
    if not error <= WORST_ERROR:
        raise UserError(f"{store.root}: record {name!r} differs from the teacher's output by {error:.1%}")
    return error


def wait_for(found: Callable[[], T | None], root: Path, what: str, timeout: float = 7200.0) -> T:
    """What rank 0 makes, once it is there."""
    deadline = time.monotonic() + timeout
    while (value := found()) is None:
        if time.monotonic() > deadline:
            raise UserError(f"{root}: rank 0 made no {what} within {timeout / 3600:g} hours")
        time.sleep(0.5)
    return value
