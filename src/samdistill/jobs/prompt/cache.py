"""``samdistill cache`` of the prompt job: what several teachers say to the prompts of every view, and the prompts."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ...data import BadInput, ObjectBatch, collate_objects, record_key, worker_count
from ...data.sources import evenly
from ...io import make_folder, write_bytes
from ...names import file_name
from ...processes import outlive_signals
from ...progress import Progress
from ...store import FeatureStore, FeatureStoreWriter, make_codec
from ...store.changes import Renewal
from ...store.spec import MANIFEST
from ...teachers import Ensemble
from ...teachers.cached_signals import record_seeds, to_records
from ...types import UserError
from ..caching import CacheCall, CacheReport, blocks_to_do, list_skipped, refuse_damage, verify_files, verify_record
from .config import PromptRunConfig
from .lines import PromptLines
from .parts import FEATURES, PromptParts

VERIFY_RECORDS = 8
"""Views that ``--verify`` asks the teachers about again."""
Writers = dict[str, dict[str, FeatureStoreWriter]]
Stores = dict[str, dict[str, FeatureStore]]


def cache_signals(config: PromptRunConfig, call: CacheCall) -> CacheReport:
    """Write what is missing of the teachers' answers to the prompts of every view; see ``pipeline.cache``.

    With the layout ``npy`` a file per view and feature is written from the stores afterwards.
    """
    start, rank, world, verify = time.monotonic(), call.rank, call.world, call.verify
    if not config.teachers:
        raise UserError("there is nothing to cache: list teachers")
    parts = PromptParts(_reading(config))
    root = parts.split_root
    ensemble = _ensemble(parts, call.device, rank, verify)
    with ExitStack() as stack:
        writers = _writers(parts, ensemble, stack, rank, world)
        every = [writer for own in writers.values() for writer in own.values()]
        cached = set.union(*(writer.done for writer in every))
        now = parts.source_fingerprints(parts.train_source.keys[rank::world])
        renewal = Renewal(root, rank, world, now, cached)
        for writer in every:
            writer.expire(renewal.stale)
        lines = stack.enter_context(PromptLines(root, rank, renewal.stale))
        bad, written = _write(parts, ensemble, writers, lines, rank, world, call.progress and rank == 0)
        renewed = renewal.conclude(set.intersection(*(writer.done for writer in every)))
    skipped = list_skipped(root, rank, [*(parts.train_source.problems if rank == 0 else ()), *bad])
    stores = {name: {feature: FeatureStore(w.root) for feature, w in own.items()} for name, own in writers.items()}
    all_stores = [store for own in stores.values() for store in own.values()]
    records, per_record = min(map(len, all_stores)), sum(store.bytes_per_record for store in all_stores)
    if records == 0:
        raise UserError(f"{root}: not one image could be cached; the first: {next(iter(skipped), None)}")
    checked, worst = _verify(parts, ensemble, stores, rank, world) if verify else (0, 0.0)
    if call.layout == "npy":
        _export(parts, stores, rank, world)
    return CacheReport(
        store=str(root), codec=config.cache.codec, records=records, written=written,
        bytes=sum(len(store) * store.bytes_per_record for store in all_stores), bytes_per_record=per_record,
        seconds=time.monotonic() - start, skipped=skipped,
        recovered=[line for writer in every for line in writer.recovered], verified=checked, worst_error=worst,
        renewed=renewed,
    )  # fmt: skip


def _reading(config: PromptRunConfig) -> PromptRunConfig:
    """The config as a cached run has it: the projections of a cache lie in the cache."""
    distillation = config.distillation.model_copy(update={"use_precomputed_features": True})
    return config.model_copy(update={"distillation": distillation})


def _ensemble(parts: PromptParts, device: str, rank: int, verify: bool) -> Ensemble:
    """The teachers. What is cached already is held against the config before any work, and, to be verified, before
    writers mend the youngest records, as they do after a power cut."""
    roots = {name: [parts.split_root / name / feature for feature in FEATURES] for name in parts.weights}
    there = {name: [root for root in own if (root / MANIFEST).is_file()] for name, own in roots.items()}
    for root in (root for own in there.values() for root in own):
        parts.refuse_other_prompts(root)
    ensemble = parts.load_teachers(device)
    for name, own in there.items():
        for root in own:
            parts.refuse_other_teacher(ensemble.teachers[name], root)
            if verify:
                refuse_damage(root, [problem for problem in FeatureStore(root).verify() if problem.key is not None])
        parts.set_projection(ensemble.teachers[name], rank)
    return ensemble


def _writers(parts: PromptParts, ensemble: Ensemble, stack: ExitStack, rank: int, world: int) -> Writers:
    found: Writers = {}
    for name, teacher in ensemble.teachers.items():
        for feature, shape in parts.record_shapes(teacher).items():
            spec = parts.store_spec(teacher, feature, shape)
            writer = FeatureStoreWriter(
                parts.split_root / name / feature, spec, make_codec(spec.codec, shape), rank, world
            )
            found.setdefault(name, {})[feature] = stack.enter_context(writer)
    return found


def _batches(parts: PromptParts, keys: Sequence[str], view: int) -> Iterator[ObjectBatch]:
    """The views of ``keys`` in order; for one that is unusable comes the next, and ``bad`` names it."""
    objects, at = parts.objects(view), {key: index for index, key in enumerate(parts.train_source.keys)}
    workers = worker_count(parts.config.data.workers)
    subset = Subset(objects, [at[key] for key in keys])
    yield from DataLoader(
        subset, parts.config.cache.batch_size, num_workers=workers, collate_fn=collate_objects,
        worker_init_fn=outlive_signals,
    )  # fmt: skip


def _write(
    parts: PromptParts, ensemble: Ensemble, writers: Writers, lines: PromptLines, rank: int, world: int,
    progress: bool,
) -> tuple[list[BadInput], int]:  # fmt: skip
    """Fill the stores with what they lack of this rank's share: what was unusable, and the number of views written."""
    every = [writer for own in writers.values() for writer in own.values()]
    mine, bad, written = parts.train_source.keys[rank::world], list[BadInput](), 0

    def done(key: str, view: int) -> bool:
        name = record_key(key, view)
        return (key, view) in lines.done and all(name in writer.done for writer in every)

    blocks = list(blocks_to_do(mine, parts.config.data.views, parts.config.cache.batch_size, done))
    with Progress("caching", sum(len(block) for _, block in blocks), "images", progress) as bar:
        for view in range(parts.config.data.views):
            wanted = [key for v, block in blocks if v == view for key in block]
            for start, batch in enumerate(_batches(parts, wanted, view) if wanted else ()):
                asked = wanted[start * parts.config.cache.batch_size :][: len(batch.images)]
                rows = [
                    row
                    for row, (key, own) in enumerate(zip(batch.images.keys, asked, strict=True))
                    if key == own and not done(key, view)
                ]
                bad += batch.bad
                if rows:
                    _keep(batch, rows, view, ensemble, writers, lines)
                    written += len(rows)
                bar.advance(len(asked))
    return bad, written


def _keep(
    batch: ObjectBatch, rows: Sequence[int], view: int, ensemble: Ensemble, writers: Writers, lines: PromptLines
) -> None:
    """The prompts and every teacher's answers of some images of a batch; what is there already is left."""
    seeds = record_seeds(batch).tolist()
    for row in rows:
        lines.write(batch, row, view)
    for teacher, records in _answers(batch, ensemble).items():
        for feature, writer in writers[teacher].items():
            for row in rows:
                name = record_key(batch.images.keys[row], view)
                if name not in writer.done:
                    writer.write(name, seeds[row], records[feature][row])


def _answers(batch: ObjectBatch, ensemble: Ensemble) -> dict[str, dict[str, Tensor]]:
    """Records on the CPU by teacher and feature."""
    said = ensemble.answer(batch, batch.groups)
    return {
        teacher: {feature: values.cpu() for feature, values in to_records(signals, batch.groups).items()}
        for teacher, signals in said.items()
    }


def _verify(
    parts: PromptParts, ensemble: Ensemble, stores: Stores, rank: int, world: int
) -> tuple[int, float]:  # fmt: skip
    """Checksums of every store, then a sample of views asked again: how many, and the worst difference of a record."""
    for store in (store for own in stores.values() for store in own.values()):
        verify_files(store, rank, world)
    mine = parts.train_source.keys[rank::world]
    keys = [key for key in mine if all(key in store for own in stores.values() for store in own.values())]
    sample, errors = evenly(keys, VERIFY_RECORDS), list[float]()
    for batch in _batches(parts, sample, 0):
        for teacher, records in _answers(batch, ensemble).items():
            for feature, store in stores[teacher].items():
                for key, record in zip(batch.images.keys, records[feature], strict=True):
                    errors.append(verify_record(store, store.codec, key, record))
    return len(sample), max(errors, default=0.0)


def _export(parts: PromptParts, stores: Stores, rank: int, world: int) -> None:
    """``npy/SPLIT/TEACHER/FEATURE/KEY.npy`` of this rank's views, ``KEY.view1.npy`` of a second view, and so on."""
    config = parts.config
    root, kind = (
        config.feature_root / "npy" / config.data.split,
        np.float16 if config.cache.codec == "fp16" else np.float32,
    )
    for view in range(config.data.views):
        for key in parts.train_source.keys[rank::world]:
            for teacher, own in stores.items():
                for feature, store in own.items():
                    name = record_key(key, view)
                    if name in store:
                        _save(root / teacher / feature / npy_name(key, view), store.read(name).features, kind)


def npy_name(key: str, view: int) -> str:
    """The file of a view of an image, below the feature's folder. A key that itself ends like a view's is encoded."""
    name = re.sub(r"\.(view\d+)$", r"%2E\1", file_name(key))
    return f"{name}.npy" if view == 0 else f"{name}.view{view}.npy"


def _save(path: Path, values: Tensor, kind: type[np.floating[Any]]) -> None:
    """Whole or not at all: a script that reads along meets no half of a file."""
    make_folder(path.parent)
    content = BytesIO()
    np.save(content, values.numpy().astype(kind))
    write_bytes(path, content.getvalue())
