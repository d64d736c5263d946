"""Several promptable teachers at once, each with its share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from ..config import TeacherEntry
from ..types import PromptSignals, UserError
from .base import Prompted, Records
from .promptable import PromptTeacher, check_match


def shares(entries: Sequence[TeacherEntry | PromptTeacher]) -> dict[str, float]:
    """Each teacher's weight over the sum of all, by name and in order; those without weight are absent.

    Raises ``UserError`` where two have the same name, and where no weight is above 0.
    """
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise UserError(f"two teachers have the same name: {', '.join(names)}")
    total = sum(entry.weight for entry in entries)
    if total <= 0:
        raise UserError("the teachers' weights sum to zero: give at least one a weight above 0")
    return {entry.name: entry.weight / total for entry in entries if entry.weight > 0}


class Ensemble:
    """``Signals`` of promptable teachers that run: they are asked the same prompts about the same images.

    weights: by name, summing to one. teachers: by name; one without weight is not kept. fingerprint: hex digest of the
    teachers' own and their names, not of weights: two ensembles that share it answer alike, given their projections.
    """

    def __init__(self, teachers: Sequence[PromptTeacher]) -> None:
        """Raises what ``shares`` raises."""
        self.weights = shares(teachers)
        self.teachers = {teacher.name: teacher for teacher in teachers if teacher.name in self.weights}
        lines = [f"{name} {teacher.fingerprint}\n" for name, teacher in sorted(self.teachers.items())]
        self.fingerprint = hashlib.sha256("".join(lines).encode()).hexdigest()

    @classmethod
    def load(cls, entries: Sequence[TeacherEntry], device: torch.device | str = "cpu") -> Ensemble:
        """Opens the teachers that have a weight. Raises what ``shares`` and ``PromptTeacher`` raise."""
        wanted = shares(entries)
        return cls([PromptTeacher(entry, device) for entry in entries if entry.name in wanted])

    @property
    def patch_channels(self) -> dict[str, int]:
        """Channels of each teacher's ``encoder_patch``; ``ValueError`` for one without a projection."""
        return {name: teacher.projected.channels for name, teacher in self.teachers.items()}

    def meets(self, grid: tuple[int, int], width: int, terms: Sequence[str]) -> None:
        """``check_match`` for every teacher."""
        for teacher in self.teachers.values():
            check_match(grid, width, terms, teacher)

    def read(self, asked: Prompted) -> Mapping[str, Records]:
        """Nothing: all that the teachers need is in the batch."""
        return {}

    def answer(self, asked: Prompted, read: Mapping[str, Records]) -> dict[str, PromptSignals]:
        """What each teacher says to the groups about the images, as ``PromptTeacher.answer`` gives it."""
        return {name: teacher.answer(asked.batch.images, asked.groups) for name, teacher in self.teachers.items()}

    def to(self, device: torch.device | str) -> Ensemble:
        """Move every teacher; costs nothing where they are there already."""
        for teacher in self.teachers.values():
            teacher.to(device)
        return self
