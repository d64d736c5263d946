"""``samdistill cache``: the teacher's embeddings of every view, written once, resumable, verifiable."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import AnyRun, RunConfig
from ..data import BadInput, image_loader, record_key
from ..engine import default_device
from ..evaluation.examples import evenly
from ..store import Codec, FeatureStore, FeatureStoreWriter, Problem, StoreSpec, make_codec, stored_codec
from ..teachers.base import IMAGE_EMBEDDING, OnlineTeacher
from ..types import UserError
from .assembly import Assembly, skipped_path
from .progress import Progress

FIT_IMAGES = 256
"""Images a PCA basis is fitted on, spread evenly over the data set."""


@dataclass(frozen=True)
class CacheReport:
    """What a cache run did. bytes counts the values files of all ranks; skipped lists unreadable inputs.

    recovered: one line for each file whose torn end, left by a kill or a power cut, was cut and written again.
    """

    store: str
    records: int
    written: int
    bytes: int
    bytes_per_record: int
    seconds: float
    skipped: list[BadInput] = field(default_factory=list)
    recovered: list[str] = field(default_factory=list)
    verified: int = 0
    worst_error: float = 0.0

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"skipped": [bad._asdict() for bad in self.skipped]}


def _blocks(keys: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(keys), size):
        yield list(keys[start : start + size])


class _Block(NamedTuple):
    """Record keys, seeds and features (n, c, h, w) of a batch, and the inputs that could not be read."""

    names: list[str]
    seeds: list[int]
    features: Tensor
    bad: list[BadInput]


def _extract(parts: Assembly, teacher: OnlineTeacher, keys: list[str], view: int) -> Iterator[_Block]:
    loader = image_loader(parts.view(view, keys), parts.config.cache.batch_size, parts.config.data.workers)
    for batch, bad in loader:
        if batch is None:
            yield _Block([], [], torch.empty(0), bad)
            continue
        features = teacher.extract(batch.to(teacher.device), (IMAGE_EMBEDDING,))[IMAGE_EMBEDDING]
        yield _Block([record_key(key, view) for key in batch.keys], batch.seeds.tolist(), features.cpu(), bad)


def _refuse_damage(root: Path, problems: Sequence[Problem]) -> None:
    if problems:
        some = "; ".join(map(str, problems[:5])) + ("; ..." if len(problems) > 5 else "")
        raise UserError(f"{root}: {len(problems)} damaged record(s): {some}")


def _codec(parts: Assembly, teacher: OnlineTeacher, spec: StoreSpec, rank: int, verify: bool) -> Codec:
    """The store's codec. One that learns from data is fitted by rank 0; the others wait until it made the store."""
    root = parts.config.store_root
    stored = stored_codec(root)
    if stored is not None:
        store = FeatureStore(root, spec)  # refuses another teacher, transform, size or codec before any work is done
        if verify:  # before the writer cuts and mends the youngest records, as it does after a power cut
            _refuse_damage(root, [problem for problem in store.verify() if problem.key is not None])
        return stored
    codec = make_codec(spec.codec, spec.shape)
    if codec.fitted:
        return codec
    if rank == 0:
        keys = parts.train_source.keys
        sample = keys[:: max(1, len(keys) // FIT_IMAGES)][:FIT_IMAGES]
        codec.fit(feature for block in _extract(parts, teacher, sample, 0) for feature in block.features)
        return codec
    return _wait_for_codec(root)


def _wait_for_codec(root: Path, timeout: float = 7200.0) -> Codec:
    deadline = time.monotonic() + timeout
    while (codec := stored_codec(root)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"{root}: rank 0 made no store within {timeout / 3600:g} hours")
        time.sleep(0.5)
    return codec


def _todo(parts: Assembly, done: set[str], rank: int, world: int) -> Iterator[tuple[int, list[str]]]:
    """(view, keys) blocks that hold at least one missing record.

    Blocks are cut from the whole list, whatever is done already: a resumed run then puts the same images into the
    same batch as an uninterrupted one, so its records are the same to the bit.
    """
    for view in range(parts.config.data.views):
        mine = parts.train_source.keys[rank::world]
        for block in _blocks(mine, parts.config.cache.batch_size):
            if any(record_key(key, view) not in done for key in block):
                yield view, block


def cache(
    config: AnyRun, *, rank: int = 0, world: int = 1, verify: bool = False, device: str | None = None,
    progress: bool = True,
) -> CacheReport:  # fmt: skip
    """Write what is missing from the store of ``config``; with ``verify`` also check it against the teacher.

    rank, world: this process's share of the images (every rank writes files of its own).
    Raises UserError where the store was made with another teacher, transform, size or codec.
    """
    if not isinstance(config, RunConfig):
        raise UserError(f"the {config.job} job has nothing to cache: its teacher answers while the student trains")
    start = time.monotonic()
    parts = Assembly(config)
    source, root = parts.train_source, config.store_root
    teacher = parts.build_teacher(device or str(default_device()))
    spec = parts.store_spec(teacher)
    codec = _codec(parts, teacher, spec, rank, verify)
    skipped = {bad.key: bad for bad in source.problems} if rank == 0 else {}
    with FeatureStoreWriter(root, spec, codec, rank, world) as writer:
        bad, written = _write(parts, teacher, writer, world, progress and rank == 0)
    skipped |= {b.key: b for b in bad}
    skipped_path(root, rank).write_text("".join(json.dumps(b._asdict()) + "\n" for b in skipped.values()))
    store = FeatureStore(root, spec)
    if len(store) == 0:
        raise UserError(f"{root}: not one image could be cached; the first: {next(iter(skipped.values()), None)}")
    checked, worst = verify_store(parts, store, teacher, codec, rank, world) if verify else (0, 0.0)
    return CacheReport(
        str(root), len(store), written, len(store) * store.bytes_per_record, store.bytes_per_record,
        time.monotonic() - start, list(skipped.values()), writer.recovered, checked, worst,
    )  # fmt: skip


def _write(
    parts: Assembly, teacher: OnlineTeacher, writer: FeatureStoreWriter, world: int, progress: bool
) -> tuple[list[BadInput], int]:
    """Fill the store with what it lacks of this rank's share: unreadable inputs, and the number of records written."""
    done, bad, written = writer.done.copy(), [], 0
    blocks = list(_todo(parts, done, writer.rank, world))
    with Progress("caching", sum(len(b) for _, b in blocks), "images", progress) as bar:
        for view in range(parts.config.data.views):
            keys = [key for v, block in blocks if v == view for key in block]
            for block in _extract(parts, teacher, keys, view) if keys else ():
                for name, seed, feature in zip(block.names, block.seeds, block.features, strict=True):
                    if name not in done:
                        writer.write(name, seed, feature)
                        written += 1
                bad += block.bad
                bar.advance(len(block.names) + len(block.bad))
    return bad, written


def verify_store(
    parts: Assembly, store: FeatureStore, teacher: OnlineTeacher, codec: Codec, rank: int = 0, world: int = 1
) -> tuple[int, float]:
    """Checksums of all records, then a sample recomputed from the images and coded again.

    With several ranks each vouches for its own files and images: the others may still be writing theirs.
    Returns how many were recomputed and the worst relative L2 difference between stored and recomputed features,
    both after the codec, so that its own loss does not count. Raises UserError on a damaged or differing record.
    """
    _refuse_damage(store.root, [p for p in store.verify() if world == 1 or p.file.startswith(f"rank{rank}-")])
    mine = [key for key in parts.train_source.keys[rank::world] if key in store]
    keys = evenly(mine, parts.config.cache.verify_records)
    worst, checked = 0.0, 0
    for block in _extract(parts, teacher, keys, 0):
        for name, feature in zip(block.names, block.features, strict=True):
            stored, again = store.read(name).features, codec.decode(codec.encode(feature))
            error = float((stored - again).norm() / again.norm().clamp(min=1e-12))
            if not error <= 0.01:
                raise UserError(f"{store.root}: record {name!r} differs from the teacher's output by {error:.1%}")
            worst, checked = max(worst, error), checked + 1
    return checked, worst
