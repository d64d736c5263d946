"""From a config to the parts every verb works on: images, views, teacher facts, store."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from ..config import Run, RunConfig
from ..data import Geometry, ImageDataset, Source, ViewTransform, open_source, record_key
from ..store import FeatureStore, StoreSpec
from ..store.spec import MANIFEST, Manifest
from ..tasks.encoder import EncoderTask
from ..teachers import Teacher, TeacherInfo, build_teacher, describe_teacher
from ..teachers.base import IMAGE_EMBEDDING, OnlineTeacher
from ..types import UserError

AnyConfig = TypeVar("AnyConfig", bound=Run)


@dataclass(frozen=True)
class Images(Generic[AnyConfig]):
    """The images of one run, on the teacher's canvas, whatever the job; built when they are first asked for."""

    config: AnyConfig

    @property
    def image_size(self) -> int:
        raise NotImplementedError

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry(self.image_size, self.config.data.geometry)

    @cached_property
    def transform(self) -> ViewTransform:
        return ViewTransform(self.geometry, self.config.data.augment)

    @cached_property
    def train_source(self) -> Source:
        return open_source(self.config.data, "train")

    def held_out_source(self) -> Source:
        return open_source(self.config.data, "held_out")


class Assembly(Images[RunConfig]):
    """Lazily built parts of one encoder run; cheap until a part that reads data or weights is asked for."""

    @cached_property
    def teacher_info(self) -> TeacherInfo:
        return describe_teacher(self.config.teacher)

    @property
    def image_size(self) -> int:
        return self.teacher_info.image_size

    def view(self, index: int, keys: Sequence[str] | None = None) -> ImageDataset:
        """View ``index`` of the training images (all of them, or ``keys``)."""
        wanted = list(self.train_source.keys if keys is None else keys)
        return ImageDataset(self.train_source, self.transform, wanted, self.config.data.seed, index)

    def build_teacher(self, device: str = "cpu") -> OnlineTeacher:
        return build_teacher(self.config.teacher, device)

    def store_spec(self, teacher: Teacher) -> StoreSpec:
        return StoreSpec(
            tap=IMAGE_EMBEDDING, shape=teacher.embedding_shape, image_size=teacher.image_size,
            teacher=teacher.fingerprint, transform=self.transform.fingerprint, codec=self.config.cache.codec,
        )  # fmt: skip

    def open_store(self) -> FeatureStore:
        """The run's store, its shape, size, transform and codec held against the config: no weights are read."""
        root, info = self.config.store_root, self.teacher_info
        if not (root / MANIFEST).is_file():
            raise UserError(f"{root}: no cached embeddings here; run `samdistill cache` with this config first")
        made_with = Manifest.load(root).spec.teacher
        wanted = StoreSpec(
            tap=IMAGE_EMBEDDING, shape=info.embedding_shape, image_size=info.image_size,
            teacher=made_with, transform=self.transform.fingerprint, codec=self.config.cache.codec,
        )  # fmt: skip
        return FeatureStore(root, wanted)

    def proven_store(self) -> FeatureStore:
        """``open_store``, and on rank 0 the teacher itself is loaded: its weights must be those that were cached."""
        store = self.open_store()
        if int(os.environ.get("RANK", 0)) == 0:
            Manifest.load(store.root).require(store.root, self.store_spec(self.build_teacher()))
        return store

    def task(self, store: FeatureStore) -> EncoderTask:
        """The job over the cached views; every image is cached, listed as skipped, or an error."""
        views, missing = [], 0
        skipped = skipped_keys(self.config.store_root)
        for index in range(self.config.data.views):
            keys = self.train_source.keys
            cached = [key for key in keys if record_key(key, index) in store]
            missing += sum(record_key(key, index) not in store and key not in skipped for key in keys)
            views.append(self.view(index, cached))
        refuse_missing(self.config.store_root, missing, len(self.train_source.keys) * len(views))
        return EncoderTask(self.config, self.teacher_info, store, views)


def refuse_missing(root: Path, missing: int, total: int) -> None:
    """``UserError`` where a cache lacks views that it does not list as skipped."""
    if missing:
        raise UserError(
            f"{root}: {missing} of {total} views are not cached; run `samdistill cache` with this config again, it "
            "resumes"
        )


def skipped_path(store_root: Path, rank: int) -> Path:
    return store_root / f"rank{rank}-skipped.jsonl"


def skipped_keys(store_root: Path) -> set[str]:
    """Keys the cache listed as unreadable."""
    found: set[str] = set()
    for path in store_root.glob("rank*-skipped.jsonl"):
        found.update(json.loads(line)["key"] for line in path.read_text().splitlines() if line)
    return found
