"""``samdistill cache``: what the teacher says to every view or frame, written once, resumable, verifiable."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...data import BadInput, image_loader, record_key
from ...data.sources import evenly
from ...progress import Progress
from ...store import Codec, FeatureStore, FeatureStoreWriter
from ...store.changes import Renewal
from ...teachers.base import IMAGE_EMBEDDING, OnlineTeacher
from ...types import UserError
from ..caching import (
    FIT_IMAGES,
    CacheCall,
    CacheReport,
    blocks_to_do,
    is_done,
    list_skipped,
    settled_codec,
    verify_files,
    verify_record,
)
from .config import EncoderRunConfig
from .parts import EncoderParts


class _Block(NamedTuple):
    """Record keys, seeds and features (n, c, h, w) of a batch, and the inputs that could not be read."""

    names: list[str]
    seeds: list[int]
    features: Tensor
    bad: list[BadInput]


def _extract(parts: EncoderParts, teacher: OnlineTeacher, keys: list[str], view: int) -> Iterator[_Block]:
    loader = image_loader(parts.view(view, keys), parts.config.cache.batch_size, parts.config.data.workers)
    for batch, bad in loader:
        if batch is None:
            yield _Block([], [], torch.empty(0), bad)
            continue
        features = teacher.extract(batch.to(teacher.device), (IMAGE_EMBEDDING,))[IMAGE_EMBEDDING]
        yield _Block([record_key(key, view) for key in batch.keys], batch.seeds.tolist(), features.cpu(), bad)


def _sample(parts: EncoderParts, teacher: OnlineTeacher) -> Iterator[Tensor]:
    """Features that a codec is fitted on."""
    keys = parts.train_source.keys
    some = keys[:: max(1, len(keys) // FIT_IMAGES)][:FIT_IMAGES]
    return (feature for block in _extract(parts, teacher, some, 0) for feature in block.features)


def cache_embeddings(config: EncoderRunConfig, call: CacheCall) -> CacheReport:
    """Write what is missing of the teacher's embeddings of every view; see ``pipeline.cache``."""
    start, rank, world, verify = time.monotonic(), call.rank, call.world, call.verify
    parts = EncoderParts(config)
    source, root = parts.train_source, config.store_root
    teacher = parts.build_teacher(call.device)
    spec = parts.store_spec(teacher)
    codec = settled_codec(root, spec, rank, verify, lambda: _sample(parts, teacher))
    with FeatureStoreWriter(root, spec, codec, rank, world) as writer:
        renewal = Renewal(root, rank, world, parts.source_fingerprints(source.keys[rank::world]), writer.done)
        writer.expire(renewal.stale)
        bad, written = _write(parts, teacher, writer, world, call.progress and rank == 0)
        renewed = renewal.conclude(writer.done)
    skipped = list_skipped(root, rank, [*(source.problems if rank == 0 else ()), *bad])
    store = FeatureStore(root, spec)
    if len(store) == 0:
        raise UserError(f"{root}: not one image could be cached; the first: {next(iter(skipped), None)}")
    checked, worst = verify_store(parts, store, teacher, codec, rank, world) if verify else (0, 0.0)
    return CacheReport(
        str(root), store.spec.codec, len(store), written, len(store) * store.bytes_per_record, store.bytes_per_record,
        time.monotonic() - start, skipped, writer.recovered, checked, worst, renewed,
    )  # fmt: skip


def _write(
    parts: EncoderParts, teacher: OnlineTeacher, writer: FeatureStoreWriter, world: int, progress: bool
) -> tuple[list[BadInput], int]:
    """Fill the store with what it lacks of this rank's share: unreadable inputs, and the number of records written."""
    done, bad, written = writer.done.copy(), [], 0
    mine, views = parts.train_source.keys[writer.rank :: world], parts.config.data.views
    blocks = list(blocks_to_do(mine, views, parts.config.cache.batch_size, is_done(done)))
    with Progress("caching", sum(len(b) for _, b in blocks), "images", progress) as bar:
        for view in range(views):
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
    parts: EncoderParts, store: FeatureStore, teacher: OnlineTeacher, codec: Codec, rank: int = 0, world: int = 1
) -> tuple[int, float]:
    """Checksums of all records, then a sample recomputed from the images and coded again.

    With several ranks each vouches for its own files and images.
    Returns how many were recomputed and the worst of ``verify_record``. Raises UserError on a damaged or differing
    record.
    """
    verify_files(store, rank, world)
    mine = [key for key in parts.train_source.keys[rank::world] if key in store]
    errors = [
        verify_record(store, codec, name, feature)
        for block in _extract(parts, teacher, evenly(mine, parts.config.cache.verify_records), 0)
        for name, feature in zip(block.names, block.features, strict=True)
    ]
    return len(errors), max(errors, default=0.0)
