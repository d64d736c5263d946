"""From a config to the parts every verb works on: images, views, teacher facts, store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from ..config import Run, RunConfig
from ..data import BadInput, Geometry, ImageDataset, Source, ViewTransform, leave_out, open_source, record_key
from ..data.fingerprints import fingerprints
from ..data.videos import VideoSource
from ..reading import read_json_lines
from ..store import FeatureStore, StoreSpec
from ..store.spec import MANIFEST, Manifest
from ..tasks.encoder import EncoderTask
from ..teachers import Teacher, TeacherInfo, build_teacher, describe_teacher
from ..teachers.base import IMAGE_EMBEDDING, OnlineTeacher
from ..types import UserError
from .changes import refuse_changed

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
        """``open_store``, and on rank 0 the teacher itself is loaded: its weights must be those that were cached, and
        so must the images."""
        store = self.open_store()
        if int(os.environ.get("RANK", 0)) == 0:
            refuse_changed(store.root, self.source_fingerprints(self.cached_keys))
            Manifest.load(store.root).require(store.root, self.store_spec(self.build_teacher()))
        return store

    @cached_property
    def cached_keys(self) -> list[str]:
        """The training images of a run that reads the cache: those that the cache did not leave out."""
        skipped = left_out_of(self.config.store_root, self.train_source)
        return [key for key in self.train_source.keys if key not in skipped]

    def source_fingerprints(self, keys: Sequence[str]) -> dict[str, str]:
        """Of the image that each record about ``keys`` is of."""
        found = fingerprints(self.train_source.fingerprint, keys)
        return {record_key(key, view): found[key] for view in range(self.config.data.views) for key in keys}

    def task(self, store: FeatureStore) -> EncoderTask:
        """The job over the cached views; every image is cached, listed as skipped, or an error."""
        views, missing = list[ImageDataset](), list[str]()
        keys = self.cached_keys
        for index in range(self.config.data.views):
            missing += [key for key in keys if record_key(key, index) not in store]
            views.append(self.view(index, keys))
        refuse_missing(self.config.store_root, missing, len(keys) * len(views))
        return EncoderTask(self.config, self.teacher_info, store, views)


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
