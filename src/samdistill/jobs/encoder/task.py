"""Encoder distillation: a small trunk regresses the teacher's image embedding.

Published as stage 1 of EfficientSAM3; the recipe's facts are in ``configs/encoder/_base.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...config import StudentConfig
from ...data import BadInput, ImageItem, collate_images, leave_out
from ...engine.task import Task
from ...ops.images import normalise
from ...students import StudentTrunk, StudentTrunkConfig, build_trunk
from ...teachers import Maps, MapSignals, TeacherInfo
from ...types import ImageBatch, Term, Terms
from .config import EncoderRunConfig
from .losses import FEATURE_LOSSES

ViewItem = tuple[ImageItem, tuple[BadInput, ...]]
"""An image, and what was unreadable on the way to it."""


@dataclass(frozen=True)
class EncoderBatch:
    """Views and what the teacher saw in them.

    told: before ``to`` what a worker read of it, then its answer. bad: images that others stand in for.
    """

    images: ImageBatch
    told: Maps
    bad: tuple[BadInput, ...] = ()

    @property
    def target(self) -> Float[Tensor, "b c gh gw"]:
        return self.told[0]


def trunk_config(student: StudentConfig, teacher: TeacherInfo, geometry: str = "square") -> StudentTrunkConfig:
    """The trunk that fits into the teacher's place: its channels, grid, input size and normalisation."""
    channels, grid, _ = teacher.embedding_shape
    return StudentTrunkConfig(
        backbone=student.backbone, head=student.head, hidden_size=channels, image_size=teacher.image_size,
        patch_size=teacher.image_size // grid, host_mean=teacher.mean, host_std=teacher.std, geometry=geometry,
    )  # fmt: skip


class EncoderTask(Task[EncoderBatch]):
    """Masked MSE + cosine between the student's trunk output and the teacher's.

    teacher: geometry and statistics of the host the student will be merged into. signals: its embeddings, computed or
    read. images: the training views of an epoch.
    """

    def __init__(
        self, config: EncoderRunConfig, teacher: TeacherInfo, signals: MapSignals,
        images: Callable[[int], Dataset[ViewItem]],
    ) -> None:  # fmt: skip
        self.config, self.teacher, self.signals, self.images = config, teacher, signals, images
        self.taught_by = signals.fingerprint

    def build_student(self) -> StudentTrunk:
        trunk = build_trunk(
            trunk_config(self.config.student, self.teacher, self.config.data.geometry), self.config.student.pretrained
        )
        return trunk.to(memory_format=torch.channels_last)  # the same numbers; convolutions a third faster, CPU or GPU

    def dataset(self, epoch: int) -> Dataset[ViewItem]:
        return self.images(epoch)

    def collate(self, items: Sequence[ViewItem]) -> EncoderBatch:
        images, _ = collate_images([item for item, _ in items])
        assert images is not None  # every item is an image
        return EncoderBatch(images, self.signals.read(images), tuple(bad for _, found in items for bad in found))

    def to(self, batch: EncoderBatch, device: torch.device) -> EncoderBatch:
        self.signals.to(device)
        leave_out(batch.bad)
        images = batch.images.to(device)
        return EncoderBatch(images, self.signals.answer(images, batch.told))

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
