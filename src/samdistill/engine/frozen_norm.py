"""Batch norm with fixed statistics (``train.batch_norm: frozen``), which are measured if the student has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from .schedule import GlobalBatches, Shard
from .task import Phase, Task

PASSES, PER_PASS = 8, 2
"""Forward passes of the measurement, and images in each. They do not depend on ranks and micro-batches."""
SMALL = 8
"""Smallest number of images for batch statistics. With fewer, they are too noisy (Wu and He, Group Normalization, 2018,
figure 1).
"""
_BatchNorm = nn.modules.batchnorm._BatchNorm


def batch_norms(student: nn.Module) -> int:
    """Return the number of batch norm layers."""
    return sum(isinstance(module, _BatchNorm) for module in student.modules())


def small_batch(layers: int, train: TrainConfig, per_item: int = 1) -> str | None:
    """Return a warning if batch norms train on fewer than ``SMALL`` images, else None.

    Args:
        layers: Number of batch norm layers.
        train: Settings of the training.
        per_item: Images in one item of a batch.
    """
    images = train.batch_size // train.accumulate * per_item
    if not layers or train.batch_norm == "frozen" or images >= SMALL:
        return None
    return (
        f"train.batch_norm=batch: {layers} batch norm layer(s) normalise with the statistics of {images} image(s), "
        f"train.batch_size / train.accumulate; set train.batch_norm=frozen, or take {SMALL} images or more"
    )


def unmeasured(student: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms that have seen no batch. Their statistics are zeros and ones."""
    norms = (module for module in student.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.num_batches_tracked is not None and not int(norm.num_batches_tracked)]


def measure_frozen(task: Task[Any], student: nn.Module, train: TrainConfig, device: torch.device) -> int:
    """Measure the statistics of the ``unmeasured`` batch norms on the first images of the run.

    Every rank computes the same. Layers that the terms of one stage do not use are measured in a later stage.

    Returns:
        Number of layers measured.
    """
    before = len(unmeasured(student))
    for _, epoch in task.stages(train):
        if unmeasured(student):
            measure(student, _passes(task, student, train.seed, Phase.of(train, epoch), device))
    return before - len(unmeasured(student))


@torch.no_grad()
def measure(student: nn.Module, passes: Iterable[Callable[[], object]]) -> None:
    """Set the statistics of the ``unmeasured`` batch norms to the average of the batch statistics.

    All other modules are in eval mode during the passes. All modes are restored.

    Args:
        student: The student.
        passes: Functions that run one forward pass of ``student`` each.
    """
    fresh, modes = unmeasured(student), {module: module.training for module in student.modules()}
    momenta = [norm.momentum for norm in fresh]
    student.eval()
    for norm in fresh:
        norm.train()
        norm.momentum = None  # None selects the unweighted average over all batches
    try:
        for forward in passes:
            forward()
    finally:
        for norm, momentum in zip(fresh, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _passes(
    task: Task[Any], student: nn.Module, seed: int, phase: Phase, device: torch.device
) -> Iterator[Callable[[], object]]:
    data = task.dataset(phase.epoch)
    items = len(data)  # type: ignore[arg-type]
    for rows in islice(GlobalBatches(items, Shard(min(PER_PASS, items)), seed, phase.epoch), PASSES):
        batch = task.to(task.collate([data[row] for row in rows], phase), device)
        yield lambda batch=batch: task.terms(student, batch, phase)
