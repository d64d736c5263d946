"""Encoder distillation: a small trunk regresses the teacher's cached image embedding.

Published as stage 1 of EfficientSAM3; the recipe's facts are in ``configs/encoder/_base.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...config import StudentConfig
from ...data import BadInput, ImageDataset, collate_images, record_key
from ...engine.task import Task
from ...ops.images import normalise
from ...store import FeatureStore
from ...students import StudentTrunk, StudentTrunkConfig, build_trunk
from ...teachers import TeacherInfo
from ...types import ImageBatch, Term, Terms, UserError
from .config import EncoderRunConfig
from .losses import FEATURE_LOSSES


@dataclass(frozen=True)
class EncoderBatch:
    """Views and what the teacher saw in them."""

    images: ImageBatch
    target: Float[Tensor, "b c gh gw"]


def trunk_config(student: StudentConfig, teacher: TeacherInfo, geometry: str = "square") -> StudentTrunkConfig:
    """The trunk that fits into the teacher's place: its channels, grid, input size and normalisation."""
    channels, grid, _ = teacher.embedding_shape
    return StudentTrunkConfig(
        backbone=student.backbone, head=student.head, hidden_size=channels, image_size=teacher.image_size,
        patch_size=teacher.image_size // grid, host_mean=teacher.mean, host_std=teacher.std, geometry=geometry,
    )  # fmt: skip


class CachedViews(Dataset):
    """The cached views of one epoch: the record's seed replays the view, the record is its target."""

    def __init__(self, images: ImageDataset, store: FeatureStore) -> None:
        self.images, self.store = images, store

    @property
    def identity(self) -> Sequence[str]:
        return self.images.keys

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[object, Tensor]:
        item = self.images[index]
        if isinstance(item, BadInput):  # it was readable when it was cached
            raise UserError(f"{item.key}: cached, but no longer readable: {item.reason}")
        record = self.store.read(record_key(item.key, self.images.view))
        if record.seed != item.seed:
            raise UserError(
                f"{item.key}: the cache was made with augmentation seed {record.seed}, this run draws {item.seed}: "
                "set data.seed as it was, or cache again"
            )
        return item, record.features


class EncoderTask(Task[EncoderBatch]):
    """Masked MSE + cosine between the student's trunk output and the teacher's.

    images: the training views (one dataset per view); keys without a record were skipped by the cache and must not
    be in it. teacher: geometry and statistics of the host the student will be merged into.
    """

    def __init__(
        self, config: EncoderRunConfig, teacher: TeacherInfo, store: FeatureStore, views: Sequence[ImageDataset]
    ) -> None:
        self.config, self.teacher, self.store, self.views = config, teacher, store, views

    def build_student(self) -> StudentTrunk:
        trunk = build_trunk(
            trunk_config(self.config.student, self.teacher, self.config.data.geometry), self.config.student.pretrained
        )
        return trunk.to(memory_format=torch.channels_last)  # the same numbers; convolutions a third faster, CPU or GPU

    def dataset(self, epoch: int) -> CachedViews:
        return CachedViews(self.views[epoch % len(self.views)], self.store)

    def collate(self, items: Sequence[tuple[object, Tensor]]) -> EncoderBatch:
        images, _ = collate_images([item for item, _ in items])
        assert images is not None  # CachedViews refuses unreadable images
        return EncoderBatch(images, torch.stack([target for _, target in items]))

    def to(self, batch: EncoderBatch, device: torch.device) -> EncoderBatch:
        return EncoderBatch(batch.images.to(device), batch.target.to(device, non_blocking=True))

    def terms(self, student: nn.Module, batch: EncoderBatch, epoch: int = 0) -> Terms:
        pixels = normalise(batch.images.images, self.teacher.mean, self.teacher.std)
        tokens = student(pixel_values=pixels).last_hidden_state
        predicted = tokens.transpose(1, 2).reshape(batch.target.shape)
        valid = batch.images.valid(tuple(batch.target.shape[-2:]))
        loss = self.config.loss
        return Terms(
            {
                name: Term(FEATURE_LOSSES.get(name)(predicted, batch.target, valid), loss.weight(name))
                for name in loss.named
            }
        )
