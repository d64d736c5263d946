"""From a config to the parts every verb works on: images, views, teacher facts, store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property

from ...data import ImageDataset, record_key
from ...data.fingerprints import fingerprints
from ...store import FeatureStore, StoreSpec
from ...store.changes import refuse_changed
from ...store.spec import MANIFEST, Manifest
from ...teachers import Teacher, TeacherInfo, build_teacher, describe_teacher
from ...teachers.base import IMAGE_EMBEDDING, OnlineTeacher
from ...types import UserError
from ..caching import left_out_of, refuse_missing
from ..images import Images
from .config import EncoderRunConfig
from .task import EncoderTask


class EncoderParts(Images[EncoderRunConfig]):
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
