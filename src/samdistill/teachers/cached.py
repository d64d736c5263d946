"""A teacher whose features were computed before: the same mapping from tap to tensor, read from a feature store."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..store import FeatureStore
from ..types import Features, ImageBatch, UserError
from .base import IMAGE_EMBEDDING, Teacher, check_taps


class CachedTeacher(Teacher):
    """Reads the records of a batch by ``batch.keys``. It knows no normalisation: it never sees a pixel."""

    def __init__(self, store: FeatureStore) -> None:
        spec = store.spec
        self.store = store
        self.taps = {spec.tap: f"(b, {', '.join(map(str, spec.shape))}): float32, read from {spec.codec} records"}
        self.image_size = spec.image_size
        self.embedding_shape = spec.shape
        self.fingerprint = spec.teacher

    def extract(self, batch: ImageBatch, taps: Sequence[str] = (IMAGE_EMBEDDING,)) -> Features:
        """The cached features of ``batch.keys``, in that order, on the device of the images.

        Raises ``UserError`` that names keys without a record, or with a record of another augmentation seed.
        """
        check_taps(taps, self.taps)
        missing = [key for key in batch.keys if key not in self.store]
        if missing:
            raise UserError(f"{len(missing)} images are not in the feature store, such as {missing[0]!r}; run: cache")
        records = [self.store.read(key) for key in batch.keys]
        strange = [r.key for r, seed in zip(records, batch.seeds.tolist(), strict=True) if r.seed != seed]
        if strange:
            raise UserError(
                f"{len(strange)} records of the feature store show another augmented view than the batch, "
                f"such as {strange[0]!r}; load the images with the records' seeds"
            )
        features = torch.stack([record.features for record in records]).float().to(batch.images.device)
        return {tap: features for tap in taps}
