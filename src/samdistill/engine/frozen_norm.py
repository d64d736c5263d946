"""Batch norm on statistics that stay: where they come from when a student has none (``train.batch_norm: frozen``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from .schedule import GlobalBatches, Shard
from .task import Task

PASSES, PER_PASS = 8, 2
"""Forward passes that measure, and images in each: the same for any number of ranks and micro-batches."""
SMALL = 8
"""Below so many images the statistics of a batch are too noisy to normalise with (Wu and He, Group Normalization, 2018,
figure 1)."""
_BatchNorm = nn.modules.batchnorm._BatchNorm


def batch_norms(student: nn.Module) -> int:
    """Number of batch norm layers."""
    return sum(isinstance(module, _BatchNorm) for module in student.modules())


def small_batch(layers: int, train: TrainConfig, per_item: int = 1) -> str | None:
    """A warning where ``layers`` batch norms train on fewer than ``SMALL`` images; None where they do not.

    per_item: images that one item of the batch has.
    """
    images = train.batch_size // train.accumulate * per_item
    if not layers or train.batch_norm == "frozen" or images >= SMALL:
        return None
    return (
        f"train.batch_norm=batch: {layers} batch norm layer(s) normalise with the statistics of {images} image(s), "
        f"train.batch_size / train.accumulate; set train.batch_norm=frozen, or take {SMALL} images or more"
    )


def unmeasured(student: nn.Module) -> list[_BatchNorm]:
    """Batch norms that have never met a batch: their statistics are zeros and ones, and would normalise nothing."""
    norms = (module for module in student.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.num_batches_tracked is not None and not int(norm.num_batches_tracked)]


def measure_frozen(task: Task[Any], student: nn.Module, train: TrainConfig, device: torch.device) -> int:
    """Measure the ``unmeasured`` batch norms on the run's first images; gives the number of layers measured.

    Every rank computes the same. Layers that the terms of one stage do not reach are measured in a later one.
    """
    before = len(unmeasured(student))
    for _, epoch in task.stages(train):
        if unmeasured(student):
            measure(student, _passes(task, student, train.seed, epoch, device))
    return before - len(unmeasured(student))


@torch.no_grad()
def measure(student: nn.Module, passes: Iterable[Callable[[], object]]) -> None:
    """Give the ``unmeasured`` batch norms the average of their batch statistics over ``passes``, forward passes of
    ``student``. Everything else is in eval mode meanwhile; all modes are put back."""
    fresh, modes = unmeasured(student), {module: module.training for module in student.modules()}
    momenta = [norm.momentum for norm in fresh]
    student.eval()
    for norm in fresh:
        norm.train()
        norm.momentum = None  # the plain average over all batches
    try:
        for forward in passes:
            forward()
    finally:
        for norm, momentum in zip(fresh, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _passes(
    task: Task[Any], student: nn.Module, seed: int, epoch: int, device: torch.device
) -> Iterator[Callable[[], object]]:
    data = task.dataset(epoch)
    items = len(data)  # type: ignore[arg-type]
    for rows in islice(GlobalBatches(items, Shard(min(PER_PASS, items)), seed, epoch), PASSES):
        batch = task.to(task.collate([data[row] for row in rows]), device)
        yield lambda batch=batch: task.terms(student, batch, epoch)
