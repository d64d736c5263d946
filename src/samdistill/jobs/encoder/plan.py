"""Plan of an encoder run: shapes, parameters, disk space, memory and steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from ...data.sources import survey
from ...engine.frozen_norm import batch_norms
from ...report import human_bytes
from ...store import record_bytes
from ...students import StudentTrunk
from ..base import Plan, optimiser_bytes, teacher_bytes
from ..caching import planned
from .config import EncoderRunConfig
from .parts import EncoderParts
from .task import trunk_config

logger = logging.getLogger("samdistill")


@dataclass(frozen=True, kw_only=True)
class EncoderPlan(Plan):
    """Plan of an encoder run. Sizes are in bytes, shapes are (channels, height, width).

    Attributes:
        shapes: Shapes of the maps that the student learns, the image embedding last.
        online: The teacher runs during training, without a cache.
        teacher_bytes: Weights of a running teacher, or 0.
        activation_bytes: Activations that autograd keeps for one micro-batch.
    """

    teacher: str
    teacher_trunk_params: int
    image_size: int
    shapes: tuple[tuple[int, int, int], ...]
    student: str
    trunk_params: int
    head_params: int
    images: int
    held_out_images: int
    views: int
    online: bool
    codec: str
    bytes_per_record: int
    cache_bytes: int
    micro_batch: int
    weights_and_optimiser_bytes: int
    teacher_bytes: int
    activation_bytes: int

    @property
    def inputs(self) -> int:
        return self.images

    @property
    def headline(self) -> str:
        return (
            f"{self.student}: {(self.trunk_params + self.head_params) / 1e6:.2f}M parameters for "
            f"{self.teacher_trunk_params / 1e6:.2f}M; {self.images} images, {human_bytes(self.cache_bytes)} of cache, "
            f"{self.steps} steps"
        )

    @property
    def raw_record_bytes(self) -> int:
        return sum(record_bytes("fp16", shape) for shape in self.shapes)

    @property
    def embedding_shape(self) -> tuple[int, int, int]:
        """Shape of the image embedding."""
        return self.shapes[-1]

    def facts(self) -> dict[str, str]:
        shape = ", ".join(" x ".join(map(str, each)) for each in self.shapes)
        views = "another view of each in every epoch" if self.online else f"{self.views} view(s) each"
        teacher = f"{human_bytes(self.teacher_bytes)} teacher, " if self.online else ""
        return {
            "teacher": f"{self.teacher} ({self.teacher_trunk_params / 1e6:.2f}M in its image encoder)",
            "student": f"{self.student} ({self.trunk_params / 1e6:.3f}M trunk + {self.head_params / 1e6:.3f}M head)",
            "embedding": f"{shape} from {self.image_size} px",
            "images": f"{self.images} to train on, {self.held_out_images} held out, {views}",
            "cache": planned(
                self.online, self.cache_bytes, f"{self.codec}, {human_bytes(self.bytes_per_record)} a record"
            ),
            "memory": f"{human_bytes(self.weights_and_optimiser_bytes)} weights and optimiser, {teacher}"
            f"{human_bytes(self.activation_bytes)} activations of {self.micro_batch} images",
            "steps": f"{self.steps} ({self.steps_per_epoch} an epoch)",
        }


def saved_activation_bytes(student: nn.Module, batch: int, image_size: int) -> int:
    """Return the bytes that autograd keeps for the backward pass of ``batch`` images, counted on the meta device."""
    seen: dict[int, int] = {}
    keep: list[torch.Tensor] = []
    weights = {p.data_ptr() if p.device.type != "meta" else id(p) for p in student.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights and not isinstance(base, nn.Parameter) and id(base) not in seen:
            seen[id(base)] = base.numel() * base.element_size()
            keep.append(base)  # keep it alive, because ids are unique among living objects only
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        student(pixel_values=torch.empty(batch, 3, image_size, image_size, device="meta"))
    return sum(seen.values())


def _meta_student(parts: EncoderParts) -> StudentTrunk:
    with torch.device("meta"):
        return StudentTrunk(trunk_config(parts.config.student, parts.teacher_info))


def plan_encoder(config: EncoderRunConfig, world: int = 1) -> EncoderPlan:
    """Return the plan of an encoder run on ``world`` ranks."""
    parts = EncoderParts(config)
    info, train = parts.teacher_info, config.train
    student = _meta_student(parts)
    images, held_out = len(survey(parts.train_source).keys), len(survey(parts.held_out_source()).keys)
    micro = train.batch_size // (world * train.accumulate)
    params = sum(p.numel() for p in student.parameters())
    trunk = sum(p.numel() for p in student.backbone.parameters())
    per_epoch = images // train.batch_size
    per_record = sum(record_bytes(config.cache.codec, shape) for shape in info.shapes.values())
    half = 2 if train.precision in ("bf16", "fp16") else 1
    return EncoderPlan(
        teacher=config.teacher.path, teacher_trunk_params=info.params, image_size=info.image_size,
        shapes=tuple(info.shapes.values()), student=config.student.backbone, trunk_params=trunk,
        head_params=params - trunk, images=images, held_out_images=held_out, views=config.data.views,
        online=config.online, codec=config.cache.codec, bytes_per_record=per_record,
        cache_bytes=0 if config.online else per_record * images * config.data.views,
        teacher_bytes=teacher_bytes(config.teacher, info.params) if config.online else 0,
        micro_batch=micro, weights_and_optimiser_bytes=optimiser_bytes(student, train),
        activation_bytes=saved_activation_bytes(student, micro, info.image_size) // half,
        batch_norms=batch_norms(student), steps_per_epoch=per_epoch, steps=per_epoch * train.total_epochs,
    )  # fmt: skip
