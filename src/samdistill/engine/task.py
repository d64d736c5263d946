"""Interface between the engine and a job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import TrainConfig
from ..types import Terms

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Phase:
    """The part of a run that an epoch belongs to. The engine gives it to the task with every batch.

    Attributes:
        epoch: Number of the epoch, from 0, over the whole run.
        name: Name of the phase in ``train.phases``. Empty without phases.
        only: Names of the terms that are trained. None trains all.
    """

    epoch: int = 0
    name: str = ""
    only: frozenset[str] | None = None

    @classmethod
    def of(cls, train: TrainConfig, epoch: int) -> Phase:
        """Return the phase of ``epoch``.

        Example:
            >>> Phase.of(TrainConfig(), 3)
            Phase(epoch=3, name='', only=None)
        """
        found = train.phase_at(epoch)
        if found is None:
            return cls(epoch)
        return cls(epoch, found.name, None if found.terms is None else frozenset(found.terms))

    def wanted(self, names: Iterable[str]) -> frozenset[str]:
        """Return the names of the terms that are trained, where ``names`` are all terms of the run."""
        return frozenset(names) if self.only is None else self.only


class Task(ABC, Generic[Batch]):
    """Student, data and objective of a training run. ``engine.fit`` trains it.

    The training signal is a ``teachers.Signals`` object, an attribute of the task. Call its ``read`` in ``collate``,
    which runs in loader workers, and its ``answer`` in ``to`` or ``terms``. A job in phases is one task and one
    ``fit``: ``TrainConfig.phases`` gives each phase its schedule and its terms.

    Exact resume, and equal losses on any number of ranks, require the following:

    - ``dataset(epoch).identity``, if it exists, is a list of strings that distinguishes the data from others. A run can
      be resumed with data that were moved, and refuses other data.
    - ``dataset(epoch)[i]`` depends on ``epoch`` and ``i`` only. Draw random numbers from a seed of the item, not from a
      global generator. Every epoch has the same length.
    - The value of a term is a mean over units of the batch, such as images, questions or frames. ``counts`` returns
      their number. The engine weights the parts of a global batch (ranks, micro-batches) by it, so the objective is the
      mean over the units of the global batch.
    - All batches of a phase have terms with the same names. The value of a term without units is zero.
    - The engine sets ``requires_grad`` (``train.freeze``) and the modes of modules. A task that changes them in
      ``terms`` restores them for each module.

    Attributes:
        leaves_unused: A batch may leave parameters of the student without gradient, such as a box encoder in a batch
            without boxes. DDP needs to know this.
        rebuilds_frozen: ``build_student`` gives the same values again to parameters that never train. Checkpoints then
            have their digest instead. False for a job whose checkpoints are read as models.
    """

    leaves_unused: ClassVar[bool] = False
    rebuilds_frozen: ClassVar[bool] = False
    taught_by: str = ""
    """Fingerprint of the running or cached teacher. A run can be resumed with this teacher only. Empty: not compared.
    """

    @abstractmethod
    def build_student(self) -> nn.Module:
        """Build the student on the CPU. The engine seeds torch before.

        Parameters with ``requires_grad`` train, unless ``train.freeze`` freezes them.
        """

    @abstractmethod
    def dataset(self, epoch: int) -> Dataset[Any]:
        """Return the map-style data set of an epoch, with ``len``. It is called at the start of the epoch.

        Args:
            epoch: Number of the epoch, from 0. It may select an augmented view.
        """

    @abstractmethod
    def collate(self, items: Sequence[Any], phase: Phase = Phase()) -> Batch:
        """Collate items of the data set into a batch. It runs in loader workers.

        ``phase`` tells which of the teacher's signals the terms need.
        """

    @abstractmethod
    def to(self, batch: Batch, device: torch.device) -> Batch:
        """Return the batch on ``device``. A task with a running teacher also moves the teacher."""

    @abstractmethod
    def terms(self, student: nn.Module, batch: Batch, phase: Phase = Phase()) -> Terms:
        """Return the loss terms of one batch, attached to the graph.

        Args:
            student: The student, which may be wrapped (DDP, mixed precision). Call it, do not use its attributes.
            batch: A batch on the device.
            phase: The phase. Terms that it does not train may be included; the engine leaves them out.
        """

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Return the number of units that the value of each term is a mean of, by name.

        It is called before the forward pass. ``name`` also applies to ``name/teacher``. Terms that are left out are
        means over images, of which all parts have equally many. The names are the same for all batches of a phase.
        """
        return {}

    def validate(self, student: nn.Module, phase: Phase = Phase()) -> dict[str, float]:
        """Return metrics to log after an epoch.

        Every rank calls it with the same data. The random number generators of training are restored afterwards.

        Args:
            student: The student, not wrapped, in eval mode, with averaged weights if EMA is on.
            phase: The phase of the epoch.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return tensors of this rank that change in training and are not the student's, such as running losses.

        Every checkpoint has those of all ranks.
        """
        return {}

    def load_state(self, states: Sequence[Mapping[str, Tensor]], rank: int, world: int) -> None:
        """Load what ``state`` returned on the ranks that wrote a checkpoint, before the first resumed epoch.

        Args:
            states: One per rank that wrote the checkpoint.
            rank: Rank of this process.
            world: Number of ranks, which may differ from that of the checkpoint.
        """

    def export(self, student: nn.Module) -> nn.Module:
        """Return the model that is saved as ``student/`` at the end: the student, or a model inside it.

        Parameters are shared, not copied, because ``check`` counts only gradients of these parameters. At the end, only
        rank 0 calls it.

        Args:
            student: The student, not wrapped, with averaged weights if EMA is on.
        """
        return student

    def finish(self, student: nn.Module) -> None:
        """Change the trained student before it is saved, in place, such as the scale of its scores.

        Only rank 0 calls it. Checkpoints have the student as it was before. What it does depends on the student and on
        held-out data only, so that a run which is continued after its last step ends with the same student.

        Args:
            student: The student, not wrapped, with averaged weights if EMA is on.
        """

    def stages(self, train: TrainConfig) -> list[tuple[str, int]]:
        """Return names and first epochs of the parts of a run in which terms or trained parameters differ.

        ``check`` tests each. By default they begin at phases and where a rule of ``train.freeze`` ends. A task whose
        terms change at other epochs adds these with ``stages_at``.
        """
        return stages_at(train, (rule.until for rule in train.freeze if rule.until is not None))


def stages_at(train: TrainConfig, epochs: Iterable[int]) -> list[tuple[str, int]]:
    """Return names and first epochs of stages, in order.

    A stage that begins with a phase has the name of the phase. One inside a phase has a name like ``phase, epoch 3``.
    Without phases the names are like ``epoch 3``, or empty if there is one stage only.

    Args:
        train: Settings of the training, with the phases.
        epochs: Further epochs (from 0) at which a stage begins. Those after the last epoch are left out.
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
