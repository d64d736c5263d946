"""Gradient check: test before training that every loss term reaches the student."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..dist import default_device
from ..types import Term, Terms, UserError
from .frozen_norm import measure_frozen
from .groups import Freezing, parameter_groups
from .quantised import Quantisation
from .schedule import GlobalBatches, Shard
from .task import Phase, Task


@dataclass(frozen=True)
class TermReport:
    """Result of ``check_terms`` for one term in one stage.

    Attributes:
        name: Name of the term.
        value: Value in the batch, unweighted.
        weight: Weight of the term.
        grad_norm: L2 norm of the gradient of ``weight * value``. Only parameters that train in the stage and belong to
            the exported model (``Task.export``) count, not those of layers that are used in training only.
        phase: Name of the stage, see ``Task.stages``. Empty if training has one stage.
    """

    name: str
    value: float
    weight: float
    grad_norm: float
    phase: str = ""

    @property
    def problem(self) -> str | None:
        """Why the term does not train the student, or None."""
        term = f"term {self.name!r}" + (f" of phase {self.phase!r}" if self.phase else "")
        if not math.isfinite(self.value):
            return f"{term} is {self.value}"
        if not math.isfinite(self.grad_norm):
            return f"{term} has a gradient of norm {self.grad_norm}"
        if self.grad_norm == 0:
            why = "it is detached from the exported model, saturated, or reaches frozen parameters alone"
            if self.weight == 0:
                why = "its weight is 0"
            elif self.value == 0:
                why = "it is 0: this batch has nothing to measure (try another train.seed), or it is at its minimum"
            return f"{term} does not reach the student: {why}"
        return None


@dataclass(frozen=True)
class CheckReport:
    """Result of ``check_terms``.

    Attributes:
        terms: The terms of every stage.
        trainable: Names of the parameters that train in some epoch.
        dead: Names of those that have a zero gradient or none in every term.
    """

    terms: tuple[TermReport, ...]
    trainable: tuple[str, ...]
    dead: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """One line per term that does not train the student."""
        return [term.problem for term in self.terms if term.problem is not None]

    @property
    def ok(self) -> bool:
        """Whether every term trains the student."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"terms": [{"name", "value", "weight", "grad_norm", "phase"}], "trainable": [parameter names]}``."""
        terms = [asdict(term) for term in self.terms]
        return {"terms": terms, "trainable": list(self.trainable)}


def check_terms(
    task: Task[Any],
    device: torch.device | str | None = None,
    batch_size: int = 4,
    seed: int = 0,
    train: TrainConfig = TrainConfig(),
) -> CheckReport:
    """Differentiate every weighted term separately on one batch per stage, with the student in train mode and fp32.

    Args:
        task: The task. One student is built and used in all stages.
        device: Device; None for the default device.
        batch_size: Items in the batch, at most those of the data set. They are the first ones of the epoch's first
            batch.
        seed: Seed of the run.
        train: Phases and frozen parameters of the run. ``Task.stages`` gives the epochs that differ.

    Raises:
        UserError: The data set is empty, there is no term, the student has no trainable parameter, or a pattern of
            ``train.freeze`` or ``train.rates`` matches no parameter.
    """
    where = torch.device(device) if device is not None else default_device()
    torch.manual_seed(seed)
    student = task.build_student().to(where)
    freezing = Freezing(student, train.freeze, train.total_epochs, train.batch_norm == "frozen")
    parameter_groups(student, train.weight_decay, train.rates)  # raises for a pattern without match
    trainable = tuple(name for name, p in student.named_parameters() if p.requires_grad)
    exported = {id(p) for p in task.export(student).parameters()}
    if train.batch_norm == "frozen":
        measure_frozen(task, student, train, where)
    quantised = Quantisation(student, task.export(student), None if train.qat is None else 0, 1)
    reports, reached = list[TermReport](), set[str]()
    for stage, epoch in task.stages(train):
        student.train()
        freezing.start(epoch)
        named = {name: p for name, p in student.named_parameters() if p.requires_grad}
        first = partial(_first_terms, task, student, where, Phase.of(train, epoch), batch_size, seed)
        if len(quantised):
            quantised.measure(first)
        terms = first()
        if not terms:
            raise UserError("the task gave no loss term" + (f" for phase {stage!r}" if stage else ""))
        for name, term in terms.items():
            norms = _gradient_norms(term, list(named.values()))
            reached |= {at for at, norm in zip(named, norms.tolist(), strict=True) if norm != 0}
            counted = torch.tensor([id(p) in exported for p in named.values()]) | ~norms.isfinite()
            total = torch.linalg.vector_norm(norms[counted]).item()
            reports.append(TermReport(name, term.value.item(), float(term.weight), total, stage))
    return CheckReport(tuple(reports), trainable, tuple(name for name in trainable if name not in reached))


def _first_terms(
    task: Task[Any], student: torch.nn.Module, device: torch.device, phase: Phase, batch_size: int, seed: int
) -> Terms:
    """Return the trained terms of the first items of the epoch's first batch."""
    data = task.dataset(phase.epoch)
    items = len(data)  # type: ignore[arg-type]
    if not items:
        raise UserError("the data set is empty: there is no batch to check the loss terms on")
    first = next(iter(GlobalBatches(items, Shard(min(batch_size, items)), seed, phase.epoch)))
    terms = task.terms(student, task.to(task.collate([data[i] for i in first], phase), device), phase)
    return terms if phase.only is None else terms.only(phase.only)


def _gradient_norms(term: Term, parameters: list[torch.nn.Parameter]) -> Tensor:
    """Return the norm of the weighted term's gradient at each parameter, on the CPU; 0 without gradient."""
    weighted = term.value * term.weight
    if not weighted.requires_grad:
        return torch.zeros(len(parameters))
    grads = torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
    zero = weighted.new_zeros((), dtype=torch.float32)
    return torch.stack([zero if g is None else torch.linalg.vector_norm(g.detach().float()) for g in grads]).cpu()
