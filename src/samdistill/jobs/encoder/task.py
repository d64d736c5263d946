"""Encoder distillation: a small trunk learns the teacher's image embedding.

It is published as stage 1 of EfficientSAM3. ``configs/encoder/_base.yaml`` has the settings of the recipe.
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
from ...engine.task import Phase, Task
from ...students import StudentTrunk, StudentTrunkConfig, TrunkOutput, build_trunk
from ...teachers import Maps, MapSignals, TeacherInfo
from ...types import ImageBatch, Term, Terms
from .config import EncoderRunConfig
from .losses import FEATURE_LOSSES

ViewItem = tuple[ImageItem, tuple[BadInput, ...]]
"""An image, and the inputs that were unusable when it was read."""


@dataclass(frozen=True)
class EncoderBatch:
    """Views of images, and the teacher's features of them.

    Attributes:
        images: The views.
        teacher_features: What a loader worker read from the signals; after ``to``, the teacher's features.
        bad: Inputs that were unusable.
    """

    images: ImageBatch
    teacher_features: Maps
    bad: tuple[BadInput, ...] = ()

    @property
    def target(self) -> Float[Tensor, "b c gh gw"]:
        """The teacher's image embedding."""
        return self.teacher_features[-1]


def trunk_config(student: StudentConfig, teacher: TeacherInfo, geometry: str = "square") -> StudentTrunkConfig:
    """Return the configuration of a trunk with the teacher's channels, grid, input size and normalisation."""
    channels, grid, _ = teacher.embedding_shape
    own = {"input_mean": teacher.mean, "input_std": teacher.std} if student.host_statistics else {}
    return StudentTrunkConfig(
        backbone=student.backbone, head=student.head, hidden_size=channels, image_size=teacher.image_size,
        patch_size=teacher.image_size // grid, host_mean=teacher.mean, host_std=teacher.std, geometry=geometry,
        fine_channels=[shape[0] for shape in teacher.fine_shapes.values()],
        **own,
    )  # fmt: skip


class EncoderTask(Task[EncoderBatch]):
    """Masked MSE and cosine between the outputs of the student's trunk and the teacher's encoder.

    With finer levels (SAM 2), each term is the mean over the levels.
    """

    def __init__(
        self, config: EncoderRunConfig, teacher: TeacherInfo, signals: MapSignals,
        images: Callable[[int], Dataset[ViewItem]],
    ) -> None:  # fmt: skip
        """Set up the task.

        Args:
            config: Configuration of the run.
            teacher: Geometry and statistics of the model that the student will be merged into.
            signals: The teacher's embeddings, running or cached.
            images: Function from an epoch to its training views.
        """
        self.config, self.teacher, self.signals, self.images = config, teacher, signals, images
        self.taught_by = signals.fingerprint

    def build_student(self) -> StudentTrunk:
        trunk = build_trunk(
            trunk_config(self.config.student, self.teacher, self.config.data.geometry), self.config.student.pretrained
        )
        return trunk.to(memory_format=torch.channels_last)  # same values; convolutions are a third faster

    def dataset(self, epoch: int) -> Dataset[ViewItem]:
        return self.images(epoch)

    def collate(self, items: Sequence[ViewItem], phase: Phase = Phase()) -> EncoderBatch:
        images, _ = collate_images([item for item, _ in items])
        assert images is not None  # every item is an image
        return EncoderBatch(images, self.signals.read(images), tuple(bad for _, found in items for bad in found))

    def to(self, batch: EncoderBatch, device: torch.device) -> EncoderBatch:
        self.signals.to(device)
        leave_out(batch.bad)
        images = batch.images.to(device)
        return EncoderBatch(images, self.signals.answer(images, batch.teacher_features))

    def terms(self, student: nn.Module, batch: EncoderBatch, phase: Phase = Phase()) -> Terms:
        found: TrunkOutput = student(pixel_values=self.teacher.pixels(batch.images))
        predicted = (*(found.fine_levels or ()), found.last_hidden_state.transpose(1, 2).reshape(batch.target.shape))
        levels = [
            (own, target, batch.images.valid(tuple(target.shape[-2:])))
            for own, target in zip(predicted, batch.teacher_features, strict=True)
        ]
        loss = self.config.loss
        return Terms({name: Term(self._mean(name, levels), loss.weight(name)) for name in loss.named})

    @staticmethod
    def _mean(name: str, levels: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Float[Tensor, ""]:
        """Return a term as the mean over the levels, each (student's, teacher's, valid cells)."""
        term = FEATURE_LOSSES.get(name)
        return torch.stack([term(*level) for level in levels]).mean()
