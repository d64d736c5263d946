"""Metrics on held-out data: means over items that do not depend on the batch size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.utils.data import Dataset

from .task import Phase, Task

Batch = TypeVar("Batch")


HELD_OUT_BATCHES = 8
"""Largest number of batches after an epoch, so that training does not wait long."""


def held_out_batches(
    task: Task[Batch], data: Dataset[Any], size: int, student: nn.Module, phase: Phase = Phase()
) -> Iterator[Batch]:
    """Yield the first ``HELD_OUT_BATCHES`` batches of ``data`` on the student's device. The last one may be smaller."""
    device, items = next(student.parameters()).device, min(len(data), HELD_OUT_BATCHES * size)  # type: ignore[arg-type]
    for start in range(0, items, size):
        yield task.to(task.collate([data[i] for i in range(start, min(start + size, items))], phase), device)


def pooled(measured: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """Return the mean of each name over all units.

    Args:
        measured: For each batch, the mean and the number of units by name.

    Returns:
        Means by name. Names without units are left out.
    """
    sums: dict[str, tuple[float, int]] = {}
    for figures in measured:
        for name, (value, count) in figures.items():
            total, units = sums.get(name, (0.0, 0))
            sums[name] = total + value * count, units + count
    return {name: total / units for name, (total, units) in sums.items() if units}


def held_out_terms(
    task: Task[Any],
    data: Dataset[Any],
    size: int,
    student: nn.Module,
    wanted: Iterable[str],
    phase: Phase = Phase(),
) -> dict[str, float]:
    """Return the loss terms ``wanted`` on held-out ``data`` and their weighted ``total``. Call it under ``no_grad``."""
    measured, weights, names = list[dict[str, tuple[float, int]]](), dict[str, float](), tuple(wanted)
    for batch in held_out_batches(task, data, size, student, phase):
        terms, counts = task.terms(student, batch, phase).only(names), task.counts(batch)
        measured.append({name: (term.value.item(), counts[name]) for name, term in terms.items()})
        weights |= {name: term.weight for name, term in terms.items()}
    means = pooled(measured)
    return {**means, "total": sum(weights[name] * value for name, value in means.items())} if means else {}
