"""Cache of the prompt job: the signals of several teachers as records, and the prompts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from io import BytesIO
from itertools import groupby
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
from ...store import FeatureStore
from ...store.spec import MANIFEST
from ...teachers import Ensemble
from ...teachers.base import Prompted
from ...teachers.stored_signals import record_seeds, to_records
from ...types import UserError
from ..caching import CacheCall, CacheReport
from ..recording import Block, Computed, Journal, Record, RecordSource, view_blocks, write_records
from .config import PromptRunConfig
from .lines import PromptLines, described
from .parts import FEATURES, PromptParts

VERIFY_RECORDS = 8
"""Number of views that ``--verify`` compares with the teachers' output."""


def cache_signals(config: PromptRunConfig, call: CacheCall) -> CacheReport:
    """Write the records of the teachers' signals. With the layout ``npy``, also write one file per view and feature."""
    source = Answers(config, call)
    report = write_records(source, call)
    if call.layout == "npy":
        _export(source)
    return report


class Answers(RecordSource):
    """Record source with one record per view of an image and store ``TEACHER/FEATURE``.

    The note of a record is its line in ``prompts.jsonl``.
    """

    def __init__(self, config: PromptRunConfig, call: CacheCall) -> None:
        if not config.teachers:
            raise UserError("there is nothing to cache: list teachers")
        # the projections of a cache are saved in its folder
        distillation = config.distillation.model_copy(update={"use_precomputed_features": True})
        self.parts = PromptParts(config.model_copy(update={"distillation": distillation}))
        self.rank, self.root = call.rank, self.parts.split_root
        self.ensemble = _ensemble(self.parts, call.device, call.rank)
        self.specs = {
            f"{name}/{feature}": self.parts.store_spec(teacher, feature, shape)
            for name, teacher in self.ensemble.teachers.items()
            for feature, shape in self.parts.record_shapes(teacher).items()
        }
        self.keys = self.parts.train_source.keys[call.rank :: call.world]

    @property
    def problems(self) -> Sequence[BadInput]:
        return self.parts.train_source.problems if self.rank == 0 else ()

    def blocks(self) -> Sequence[Block]:
        config = self.parts.config
        return view_blocks(self.keys, config.data.views, config.cache.batch_size)

    def compute(self, blocks: Sequence[Block]) -> Iterator[Computed]:
        """Yield the records of each block.

        In the batch, an unusable image is replaced by the next one, for which no record is made here.
        """
        for view, group in groupby(blocks, key=lambda block: block.about[0]):
            wanted = [block.about[1] for block in group]
            for asked, batch in zip(wanted, self._batches([key for keys in wanted for key in keys], view), strict=True):
                seeds, records = record_seeds(batch).tolist(), self._answers(batch)
                yield Computed(
                    [
                        Record(
                            record_key(key, view), seeds[row],
                            {store: values[row] for store, values in records.items()},
                            described(batch, row, view),
                        )
                        for row, (key, own) in enumerate(zip(batch.images.keys, asked, strict=True))
                        if key == own
                    ],
                    batch.bad,
                )  # fmt: skip

    def fingerprints(self) -> Mapping[str, str]:
        return self.parts.source_fingerprints(self.keys)

    def sample(self, store: str) -> Iterator[Tensor]:
        raise NotImplementedError("no codec of this cache learns from data")

    def probe(self, done: Collection[str]) -> Iterator[Record]:
        sample = evenly([key for key in self.keys if key in done], VERIFY_RECORDS)
        found = self.compute(view_blocks(sample, 1, self.parts.config.cache.batch_size))
        return (record for computed in found for record in computed.records)

    def journal(self, stale: Collection[str]) -> AbstractContextManager[Journal]:
        return PromptLines(self.root, self.rank, stale)

    def _batches(self, keys: Sequence[str], view: int) -> Iterator[ObjectBatch]:
        """Yield the views of ``keys`` in order. An unusable one is replaced by the next and named in ``bad``."""
        parts = self.parts
        objects, at = parts.objects(view), {key: index for index, key in enumerate(parts.train_source.keys)}
        yield from DataLoader(
            Subset(objects, [at[key] for key in keys]), parts.config.cache.batch_size,
            num_workers=worker_count(parts.config.data.workers), collate_fn=collate_objects,
            worker_init_fn=outlive_signals,
        )  # fmt: skip

    def _answers(self, batch: ObjectBatch) -> dict[str, Tensor]:
        """Return the features on the CPU, by store."""
        return {
            f"{teacher}/{feature}": values.cpu()
            for teacher, signals in self.ensemble.answer(Prompted(batch, batch.groups), {}).items()
            for feature, values in to_records(signals, batch.groups).items()
        }


def _ensemble(parts: PromptParts, device: str, rank: int) -> Ensemble:
    """Load the teachers. An existing cache is compared with the config first."""
    roots = {name: [parts.split_root / name / feature for feature in FEATURES] for name in parts.weights}
    there = {name: [root for root in own if (root / MANIFEST).is_file()] for name, own in roots.items()}
    for root in (root for own in there.values() for root in own):
        parts.refuse_other_prompts(root)
    ensemble = parts.load_teachers(device)
    for name, own in there.items():
        for root in own:
            parts.refuse_other_teacher(ensemble.teachers[name], root)
        parts.set_projection(ensemble.teachers[name], rank)
    return ensemble


def _export(source: Answers) -> None:
    """Write views of this rank as ``npy/SPLIT/TEACHER/FEATURE/KEY.npy``; further views of an image as ``KEY.view1.npy``
    etc.
    """
    config = source.parts.config
    root = config.feature_root / "npy" / config.data.split
    kind = np.float16 if config.cache.codec == "fp16" else np.float32
    stores = {name: FeatureStore(source.root / name) for name in source.specs}
    for view in range(config.data.views):
        for key in source.keys:
            for place, store in stores.items():
                if (name := record_key(key, view)) in store:
                    _save(root / place / npy_name(key, view), store.read(name).features, kind)


def npy_name(key: str, view: int) -> str:
    """Return the file name of a view. In a key that ends like a view (``.view1``) this dot is percent-encoded."""
    name = re.sub(r"\.(view\d+)$", r"%2E\1", file_name(key))
    return f"{name}.npy" if view == 0 else f"{name}.view{view}.npy"


def _save(path: Path, values: Tensor, kind: type[np.floating[Any]]) -> None:
    """Write the file atomically, so that other programs never read an incomplete file."""
    make_folder(path.parent)
    content = BytesIO()
    np.save(content, values.numpy().astype(kind))
    write_bytes(path, content.getvalue())
