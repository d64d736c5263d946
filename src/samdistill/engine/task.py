"""The one thing the engine knows about a job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from ..config import TrainConfig
from ..types import Terms

Batch = TypeVar("Batch")


class Task(ABC, Generic[Batch]):
    """A student, its data, and the objective that ties it to a teacher. ``engine.fit`` does the rest.

    How the jobs fit: what teaches is a ``teachers.Signals``, an attribute of the task, running or cached. Its ``read``
    belongs into ``collate``, which runs in loader workers, its ``answer`` into ``to`` or ``terms``. *encoder* compares
    feature maps; *detection* asks its teacher in ``terms`` and matches queries there; *prompt* has several weighted
    teachers and draws prompts in ``dataset``; *video* makes a clip the item. A job in phases (features and outputs,
    then outputs alone) is one task and one ``fit``: ``TrainConfig.phases`` gives each its schedule and its terms, and a
    resume lands in the right one.

    Rules that exact resume and equal losses on any number of ranks rest on:

    - ``dataset(epoch).identity``, where there is one, is a list of strings that other data would not have: a run goes
      on with data that were moved, and refuses others.
    - ``dataset(epoch)[i]`` depends on ``epoch`` and ``i`` alone (draw from a seed kept with the item, not from a global
      generator), and every epoch has the same length.
    - A term's value is a mean over units of the batch: images, questions, frames. ``counts`` says how many each batch
      has, and the engine weights the parts of a global batch (ranks, micro-batches) by that: the objective is the mean
      over the units of the global batch, however it is divided.
    - The names of the terms are the same for every batch of a phase; a term without anything to measure is a zero.
    - The engine decides what trains (``train.freeze``) and in which mode each module is; a task that changes either
      while it computes the terms puts it back, module by module.

    ``leaves_unused``: a batch may leave parameters of the student out (a box encoder in a batch without boxes), which
    ranks have to be told.
    """

    leaves_unused: ClassVar[bool] = False
    taught_by: str = ""
    """Fingerprint of the teacher, running or cached; a run goes on with the same alone. Empty: not compared."""

    @abstractmethod
    def build_student(self) -> nn.Module:
        """The student on the CPU. What has ``requires_grad`` is trained, unless ``train.freeze`` holds it; the engine
        seeds torch before the call."""

    @abstractmethod
    def dataset(self, epoch: int) -> Dataset[Any]:
        """A map-style data set with ``len``; ``epoch`` counts from 0, may select an augmented view, and begins here."""

    @abstractmethod
    def collate(self, items: Sequence[Any]) -> Batch:
        """Items of the data set to one batch; runs in loader workers."""

    @abstractmethod
    def to(self, batch: Batch, device: torch.device) -> Batch:
        """The batch on ``device``. A task with a running teacher moves that along at the first call."""

    @abstractmethod
    def terms(self, student: nn.Module, batch: Batch, epoch: int = 0) -> Terms:
        """Loss terms of one batch of ``epoch`` (from 0), attached to the graph; its phase is ``train.phase_at(epoch)``.

        ``student`` may be wrapped (DDP, mixed precision): reach it by calling it, never through its attributes.
        """

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Number of units that each term's value is a mean of, by name, known before the forward pass.

        ``name`` covers ``name/teacher``. A name left out is a mean over images, of which every part has as many. The
        names are the same for every batch of a phase.
        """
        return {}

    def validate(self, student: nn.Module, epoch: int = 0) -> dict[str, float]:
        """Figures to log after ``epoch`` (from 0). ``student`` is unwrapped, in eval mode, averaged if EMA is on.

        Every rank calls it on the same data; the random streams of training are put back afterwards.
        """
        return {}

    def export(self, student: nn.Module) -> nn.Module:
        """What is saved as ``student/`` at the end: the student itself, or the model inside it.

        ``student`` is unwrapped and averaged if EMA is on. Parameters are shared, not copied: ``check`` counts the
        gradients of those in here alone. Rank 0 alone calls it at the end.
        """
        return student

    def stages(self, train: TrainConfig) -> list[tuple[str, int]]:
        """Names and first epochs of the parts of a run whose terms or trained parameters differ: ``check`` tests each.

        Here, the phases and the epochs at which a rule of ``train.freeze`` ends. A task whose terms change at other
        epochs adds those through ``stages_at``.
        """
        return stages_at(train, (rule.until for rule in train.freeze if rule.until is not None))


def stages_at(train: TrainConfig, epochs: Iterable[int]) -> list[tuple[str, int]]:
    """The starts of the phases and of further ``epochs`` (from 0), in order; those after the end are left out.

    A phase lends its name to its start, and ``phase, epoch 3`` to an epoch inside it. Without phases the names are
    ``epoch 3``, and empty where there is one stage alone.
    """
    phases = {epoch: name for name, epoch in train.phase_starts()}
    wanted = sorted({*phases, *(epoch for epoch in epochs if epoch < train.total_epochs)})
    if wanted == [0]:
        return [(phases[0], 0)]
    found = []
    for epoch in wanted:
        phase, name = train.phase_at(epoch), phases.get(epoch)
        inside = f"{phase.name}, epoch {epoch}" if phase is not None else f"epoch {epoch}"
        found.append((name or inside, epoch))
    return found
