"""What was answered about single frames of videos, question by question, and its figures by group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..data.skipped import BadInput

ALL, LOOKALIKES, UNIQUE, OCCLUDED, REAPPEARED = GROUPS = ("all", "lookalikes", "unique", "occluded", "reappeared")
"""Every question. Objects that share all their names with another one in the frame, and those that do not; objects
without names are neither. Objects less than half visible, which only rendered videos tell. Objects that the frame
before did not show, but one before that in the context did."""
Kind = Literal["none", "own", "teacher"]


@dataclass(frozen=True)
class ClipAnswer:
    """One question about an object in one frame, and how good the answer is. groups: of ``GROUPS``, without ``ALL``."""

    key: str
    frame: int
    object_id: int
    phrase: str
    j: float
    f: float
    groups: tuple[str, ...]


@dataclass(frozen=True)
class ClipScores:
    """All answers, in the order of keys, frames and objects. skipped: videos that could not be used."""

    memory: Kind
    answers: tuple[ClipAnswer, ...]
    skipped: tuple[BadInput, ...]

    def summary(self, group: str = ALL) -> dict[str, float]:
        """``j``, ``f``: means over the group's questions. ``jf``: of both. ``count``: of questions. {} without any."""
        own = [answer for answer in self.answers if group == ALL or group in answer.groups]
        if not own:
            return {}
        j, f = float(np.mean([answer.j for answer in own])), float(np.mean([answer.f for answer in own]))
        return {"jf": (j + f) / 2, "j": j, "f": f, "count": float(len(own))}

    def to_dict(self) -> dict[str, Any]:
        """Figures of each group that has a question, and what was skipped; single answers stay in the fields."""
        return {
            "memory": self.memory,
            "groups": {group: figures for group in GROUPS if (figures := self.summary(group))},
            "skipped": [{"key": bad.key, "reason": bad.reason} for bad in self.skipped],
        }
