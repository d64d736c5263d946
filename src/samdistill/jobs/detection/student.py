"""Kinds of students of the detection job (``student.kind``), and what the job has to know about each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, Sam3LiteTextConfig

from ...checkpoints.files import STUDENT_FOLDER, TensorInfo
from ...checkpoints.hosting import trained_trunk
from ...checkpoints.student import start_from, trunk_backbone
from ...checkpoints.text import OpenedText, find_text, lite_host, with_text
from ...checkpoints.words import Phrases
from ...engine.groups import frozen_until
from ...inference.concepts import ConceptModel, StudentDetector
from ...ops.images import Statistics
from ...students import (
    EfficientSam3Config,
    EfficientSam3Model,
    HostedStudent,
    StudentTrunkConfig,
    build_detector,
    build_trunk,
    efficient_sam3_config,
    host_trunk,
    hosted_config,
    inherit,
    without_dropout,
)
from ...students.backbones import checkpoint_stages
from ...teachers import DetectorInfo, Maps, Sam3Detector
from ...teachers.sam3_detector import Host, describe_host, detector_parts, find_detector, load_detector
from ...types import UserError
from .config import TRUNK, DetectionRunConfig
from .trunks import refuse_other_teacher
from .words import missing_text, planned_text

TEXT_ENCODER = ("text_encoder.", "text_projection.")
"""Beginnings of the names of the parameters that compute text features."""


class StudentKind(ABC):
    """A kind of student.

    Args:
        config: Configuration of the run.
        teacher: The teacher.

    Attributes:
        title: Name of the students of this kind on a report.
        mean, std: Normalisation of the student's images.
        context: Largest number of tokens of a phrase.
        queries: Number of object queries.
    """

    title: ClassVar[str]
    mean: Statistics
    std: Statistics
    context: int
    queries: int

    def __init__(self, config: DetectionRunConfig, teacher: DetectorInfo) -> None:
        self.config, self.settings, self.teacher = config, config.student, teacher

    @abstractmethod
    def outline(self) -> nn.Module:
        """Return the student without values, on the meta device. Names of parameters are those of ``build``."""

    @abstractmethod
    def build(self, teacher: Sam3Detector) -> nn.Module:
        """Build the student on the CPU with its initial weights.

        Its ``forward`` has the arguments and the output of ``EfficientSam3Model.forward``.
        """

    @abstractmethod
    def export(self, student: Any) -> PreTrainedModel:
        """Return the model in a student of ``build`` that is saved."""

    @abstractmethod
    def detector(self, student: Any, words: Phrases) -> ConceptModel:
        """Return a student of ``build``, in eval mode, as a detector."""

    def parts(self, outline: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that a plan counts, by name."""
        return dict(outline.named_children())

    def maps(self, student: nn.Module, pixels: Tensor, term: str) -> Maps:
        """Return the maps of images that ``term`` compares, ``FPN`` or ``TRUNK``. ``student`` may be wrapped."""
        return student(pixel_values=pixels).fpn_hidden_states

    def shares_text(self, epoch: int) -> bool:
        """Whether the student's text encoder is, in this epoch, the teacher's without changes."""
        return False


class Described(StudentKind):
    """``EfficientSam3Model``: a pyramid on a backbone, a small text encoder, heads with fewer layers and queries."""

    title = "EfficientSam3"

    def __init__(self, config: DetectionRunConfig, teacher: DetectorInfo) -> None:
        super().__init__(config, teacher)
        vision = self.model_config.vision_config
        self.mean, self.std = tuple(vision.image_mean), tuple(vision.image_std)
        self.context, self.queries = self.settings.text.context, self.settings.queries

    @cached_property
    def model_config(self) -> EfficientSam3Config:
        """Configuration of a student with the width, input size and vocabulary of the teacher."""
        student, text = self.settings, self.settings.text
        found = efficient_sam3_config(
            backbone=student.backbone, image_size=self.teacher.image_size, hidden_size=self.teacher.hidden_size,
            heads=student.heads, ffn=student.ffn, encoder_layers=student.encoder_layers,
            decoder_layers=student.decoder_layers, queries=student.queries,
            text={
                "hidden_size": text.hidden, "projection_dim": text.hidden, "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads, "intermediate_size": text.ffn,
                "vocab_size": self.teacher.vocab_size,
            },
        )  # fmt: skip
        found.geometry = self.config.data.geometry
        return found

    def outline(self) -> EfficientSam3Model:
        with torch.device("meta"):
            return EfficientSam3Model(self.model_config)

    def build(self, teacher: Sam3Detector) -> EfficientSam3Model:
        settings, backbone = self.settings, self.model_config.vision_config.backbone
        student = build_detector(self.model_config, settings.pretrained)
        if settings.trunk is not None:
            student.vision_encoder.backbone.load_state_dict(trunk_backbone(settings.trunk, backbone))
        if settings.start is not None:
            start_from(student, settings.start)
        if settings.inherit:
            inherit(student, teacher.model.state_dict())
        student.vision_encoder.to(memory_format=torch.channels_last)
        if settings.checkpointing:
            checkpoint_stages(student.vision_encoder.backbone)
        return student

    def export(self, student: EfficientSam3Model) -> EfficientSam3Model:
        return student

    def detector(self, student: EfficientSam3Model, words: Phrases) -> ConceptModel:
        return StudentDetector(student, words)


class Hosted(StudentKind):
    """A host, which is the teacher by default, with a small trunk in the place of its ViT, and a small text encoder in
    the place of its own if there is one. All other tensors are the host's.
    """

    title = "SAM 3's heads"

    def __init__(self, config: DetectionRunConfig, teacher: DetectorInfo) -> None:
        super().__init__(config, teacher)
        self.source = config.teacher
        if self.settings.host is not None:
            changed = {"path": self.settings.host, "image_size": teacher.image_size}
            self.source = config.teacher.model_copy(update=changed)
        own = self.settings.host is None and config.text_encoder is None
        self.info = teacher if own else describe_host(self.source.path, self.host)
        for name in ("queries", "hidden_size", "vocab_size"):
            own, theirs = getattr(self.info, name), getattr(teacher, name)
            if own != theirs:
                raise UserError(
                    f"student.host={self.source.path}: {name} is {own}, but that of {teacher.path} is {theirs}; "
                    "give a model with the teacher's heads and vocabulary"
                )
        self.mean, self.std = self.info.mean, self.info.std
        self.context, self.queries = self.info.context, self.info.queries

    @cached_property
    def _found(self) -> tuple[Path, Host]:
        """Place and configuration of the model that gives neck and heads."""
        return find_detector(self.source)

    @cached_property
    def text(self) -> OpenedText | None:
        """The small text encoder. None if the student has the host's, or if it is not made yet."""
        place = self.config.text_encoder
        if place is None or (self.config.trains_text and not (place / STUDENT_FOLDER).exists()):
            return None
        if not place.exists():
            raise missing_text(place, None)
        with self._text_errors():
            return find_text(place)

    @contextmanager
    def _text_errors(self) -> Iterator[None]:
        """Name the key in an error about the text encoder."""
        try:
            yield
        except UserError as error:
            raise UserError(f"student.text_encoder={self.config.text_encoder}: {error}") from None

    @cached_property
    def host(self) -> Any:
        """Configuration of the student with the host's own trunk, without dropout."""
        place, host = self._found
        if self.config.text_encoder is not None:
            if self.settings.host is not None and isinstance(host, Sam3LiteTextConfig):
                raise UserError(
                    f"student.host={self.source.path} has a small text encoder of its own; leave student.text_encoder "
                    "and student.text_recipe out, or give a host with SAM 3's"
                )
            text = self.text.config if self.text is not None else planned_text(self.config, self.teacher)
            with self._text_errors():
                host = lite_host(host, text, place)
        return without_dropout(host)

    @cached_property
    def trunk_config(self) -> StudentTrunkConfig:
        """Configuration of a trunk with the channels and cells of the host's ViT."""
        vit = self.host.vision_config.backbone_config
        return StudentTrunkConfig(
            backbone=self.settings.backbone, head=self.settings.head, hidden_size=vit.hidden_size,
            image_size=self.info.image_size, patch_size=vit.patch_size, host_mean=self.mean, host_std=self.std,
            geometry=self.config.data.geometry,
        )  # fmt: skip

    def outline(self) -> nn.Module:
        with torch.device("meta"):
            return AutoModel.from_config(hosted_config(self.host, self.trunk_config))

    def build(self, teacher: Sam3Detector) -> HostedStudent:
        settings, place = self.settings, self.config.text_encoder
        if place is not None and self.text is None:
            raise missing_text(place, settings.text_recipe)
        trunk = build_trunk(self.trunk_config, settings.pretrained)
        model = load_detector(self.source.path, without_dropout(self._found[1]))  # a running teacher may be in fp16
        if self.text is not None:
            model = with_text(model, self.text, self.host)
        if settings.trunk is not None:
            refuse_other_teacher(settings.trunk, model.vision_encoder.backbone, self.source.path)
            kept = {name: TensorInfo.of(tensor) for name, tensor in model.state_dict().items()}
            trunk.load_state_dict(trained_trunk(settings.trunk, trunk, kept, self.source.path))
        model = host_trunk(model, trunk)
        if settings.start is not None:
            start_from(model, settings.start)
        trunk.to(memory_format=torch.channels_last)
        if settings.checkpointing:
            checkpoint_stages(trunk.backbone)
        return HostedStudent(model)

    def maps(self, student: nn.Module, pixels: Tensor, term: str) -> Maps:
        if term == TRUNK:
            return (student(pixel_values=pixels, trunk_only=True).trunk,)
        return super().maps(student, pixels, term)

    @cached_property
    def _text_trains(self) -> float:
        """First epoch in which a parameter of the text encoder trains."""
        names = [name for name, _ in self.outline().named_parameters() if name.startswith(TEXT_ENCODER)]
        return min(frozen_until(name, self.config.train.freeze) for name in names)

    def shares_text(self, epoch: int) -> bool:
        own = (self.settings.host, self.settings.start, self.config.text_encoder)
        return not any(own) and self.config.teacher.precision == "fp32" and epoch < self._text_trains

    def export(self, student: HostedStudent) -> PreTrainedModel:
        return student.model

    def detector(self, student: HostedStudent, words: Phrases) -> ConceptModel:
        return Sam3Detector.around(student.model.eval(), self.info, words)

    def parts(self, outline: nn.Module) -> dict[str, nn.Module]:
        return detector_parts(outline)


KINDS: dict[str, type[StudentKind]] = {"described": Described, "hosted": Hosted}
"""Classes by the values of ``student.kind``."""


def student_kind(config: DetectionRunConfig, teacher: DetectorInfo) -> StudentKind:
    """Return what the job has to know about the student of ``config``.

    Raises:
        UserError: The student cannot be built from its settings.
    """
    return KINDS[config.student.kind](config, teacher)
