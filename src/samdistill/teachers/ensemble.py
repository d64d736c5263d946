"""Several weighted promptable teachers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from ..config import TeacherEntry
from ..types import PromptSignals, UserError
from .base import Prompted, Records
from .promptable import PromptTeacher, check_match


def shares(entries: Sequence[TeacherEntry | PromptTeacher]) -> dict[str, float]:
    """Return each teacher's weight divided by the sum of weights, by name in the given order.

    Teachers without weight are left out.

    Raises:
        UserError: Two teachers have the same name, or no weight is above 0.
    """
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise UserError(f"two teachers have the same name: {', '.join(names)}")
    total = sum(entry.weight for entry in entries)
    if total <= 0:
        raise UserError("the teachers' weights sum to zero: give at least one a weight above 0")
    return {entry.name: entry.weight / total for entry in entries if entry.weight > 0}


class Ensemble:
    """``Signals`` of running promptable teachers, which all get the same images and prompts.

    Attributes:
        weights: Weights by name, which sum to 1.
        teachers: Teachers by name, without those that have no weight.
        fingerprint: Hex digest of the teachers' names and fingerprints, without the weights. Ensembles with the same
            fingerprint and projections give the same signals.
    """

    def __init__(self, teachers: Sequence[PromptTeacher]) -> None:
        """Set up the ensemble. Raises the errors of ``shares``."""
        self.weights = shares(teachers)
        self.teachers = {teacher.name: teacher for teacher in teachers if teacher.name in self.weights}
        lines = [f"{name} {teacher.fingerprint}\n" for name, teacher in sorted(self.teachers.items())]
        self.fingerprint = hashlib.sha256("".join(lines).encode()).hexdigest()

    @classmethod
    def load(cls, entries: Sequence[TeacherEntry], device: torch.device | str = "cpu") -> Ensemble:
        """Load the teachers that have a weight. Raises the errors of ``shares`` and ``PromptTeacher``."""
        wanted = shares(entries)
        return cls([PromptTeacher(entry, device) for entry in entries if entry.name in wanted])

    @property
    def patch_channels(self) -> dict[str, int]:
        """Channels of ``encoder_patch`` by teacher.

        Raises:
            ValueError: A teacher has no projection.
        """
        return {name: teacher.projected.channels for name, teacher in self.teachers.items()}

    def meets(self, grid: tuple[int, int], width: int, terms: Sequence[str]) -> None:
        """Call ``check_match`` for every teacher."""
        for teacher in self.teachers.values():
            check_match(grid, width, terms, teacher)

    def read(self, asked: Prompted) -> Mapping[str, Records]:
        """Return nothing, because the batch contains all that the teachers need."""
        return {}

    def answer(self, asked: Prompted, read: Mapping[str, Records]) -> dict[str, PromptSignals]:
        """Return ``PromptTeacher.answer`` of each teacher, by name."""
        return {name: teacher.answer(asked.batch.images, asked.groups) for name, teacher in self.teachers.items()}

    def to(self, device: torch.device | str) -> Ensemble:
        """Move every teacher to ``device``. Does nothing for those that are there."""
        for teacher in self.teachers.values():
            teacher.to(device)
        return self
