"""``samdistill plan``: shapes, parameters, disk, memory and steps of a config, before anything is spent."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from ..config import AnyRun, DetectionRunConfig, PromptRunConfig, RunConfig, VideoRunConfig
from ..data import BadInput, reporting
from ..data.sources import survey
from ..engine.frozen_norm import batch_norms, small_batch
from ..store import record_bytes
from ..students import StudentTrunk
from ..tasks.encoder import student_config
from .assembly import Assembly
from .detection import DetectionPlan, plan_detection
from .prompt import PromptPlan, plan_prompt
from .video import VideoAssembly
from .video_task import VideoPlan, plan_video

logger = logging.getLogger("samdistill")


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, shapes as (channels, height, width); activations are those autograd keeps for one micro-batch.

    batch_norms: layers of batch norm that train.
    """

    teacher: str
    teacher_trunk_params: int
    image_size: int
    embedding_shape: tuple[int, int, int]
    student: str
    trunk_params: int
    head_params: int
    images: int
    held_out_images: int
    views: int
    codec: str
    bytes_per_record: int
    cache_bytes: int
    micro_batch: int
    weights_and_optimiser_bytes: int
    activation_bytes: int
    batch_norms: int
    steps_per_epoch: int
    steps: int
    skipped: tuple[BadInput, ...] = ()
    """Inputs that the run will leave out."""

    @property
    def trained_on(self) -> str:
        return f"{self.images} images"

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"skipped": [bad._asdict() for bad in self.skipped]}


AnyPlan = Plan | DetectionPlan | PromptPlan | VideoPlan


def saved_activation_bytes(student: nn.Module, batch: int, image_size: int) -> int:
    """Bytes autograd keeps for the backward pass of ``batch`` images, counted on the meta device."""
    seen: dict[int, int] = {}
    keep: list[torch.Tensor] = []
    weights = {p.data_ptr() if p.device.type != "meta" else id(p) for p in student.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights and not isinstance(base, nn.Parameter) and id(base) not in seen:
            seen[id(base)] = base.numel() * base.element_size()
            keep.append(base)  # ids are only unique among the living
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        student(pixel_values=torch.empty(batch, 3, image_size, image_size, device="meta"))
    return sum(seen.values())


def _meta_student(parts: Assembly) -> StudentTrunk:
    with torch.device("meta"):
        return StudentTrunk(student_config(parts.config.student, parts.teacher_info))


def plan(config: AnyRun, *, world: int = 1) -> AnyPlan:
    """Everything a run will need; reads configs and lists files, loads no weights and decodes no image.

    Warns where batch norms would train on the statistics of too few images.
    """
    with reporting("plan") as left_out:
        found = _plan(config, world)
        found = replace(found, skipped=tuple(left_out.found))
    frames = config.clips.context if isinstance(config, VideoRunConfig) else 1
    warning = small_batch(found.batch_norms, config.train, frames)
    if warning is not None:
        logger.warning(warning)
    return found


def _plan(config: AnyRun, world: int) -> AnyPlan:
    if isinstance(config, DetectionRunConfig):
        return plan_detection(config)
    if isinstance(config, PromptRunConfig):
        return plan_prompt(config)
    if isinstance(config, VideoRunConfig):
        return plan_video(VideoAssembly(config))
    return plan_encoder(config, world)


def plan_encoder(config: RunConfig, world: int = 1) -> Plan:
    """``plan`` of the encoder job."""
    parts = Assembly(config)
    info, train = parts.teacher_info, config.train
    student = _meta_student(parts)
    images, held_out = len(survey(parts.train_source).keys), len(survey(parts.held_out_source()).keys)
    micro = train.batch_size // (world * train.accumulate)
    params = sum(p.numel() for p in student.parameters())
    trunk = sum(p.numel() for p in student.backbone.parameters())
    per_epoch = images // train.batch_size
    per_record = record_bytes(config.cache.codec, info.embedding_shape)
    copies = 4 + (1 if train.ema else 0)  # weights, gradients, two Adam moments, weight average
    half = 2 if train.precision in ("bf16", "fp16") else 1
    return Plan(
        teacher=config.teacher.path, teacher_trunk_params=info.params, image_size=info.image_size,
        embedding_shape=info.embedding_shape, student=config.student.backbone, trunk_params=trunk,
        head_params=params - trunk, images=images, held_out_images=held_out, views=config.data.views,
        codec=config.cache.codec, bytes_per_record=per_record, cache_bytes=per_record * images * config.data.views,
        micro_batch=micro, weights_and_optimiser_bytes=params * 4 * copies,
        activation_bytes=saved_activation_bytes(student, micro, info.image_size) // half,
        batch_norms=batch_norms(student), steps_per_epoch=per_epoch, steps=per_epoch * train.total_epochs,
    )  # fmt: skip
