"""Results of single-frame questions about videos, and their mean scores by group of questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..data.skipped import BadInput

ALL, LOOKALIKES, UNIQUE, OCCLUDED, REAPPEARED = GROUPS = ("all", "lookalikes", "unique", "occluded", "reappeared")
"""Groups of questions:

- ``all``: every question;
- ``lookalikes``: another object in the frame has the same set of names;
- ``unique``: the object has names, and no other object in the frame has the same set;
- ``occluded``: less than half of the object is visible, which is known for rendered videos only;
- ``reappeared``: the object is not visible in the annotated frame before, but in an earlier one of the context.
"""
Kind = Literal["none", "own", "teacher"]
"""Memory of the model: none, the student's own feature maps, or the teacher's."""


@dataclass(frozen=True)
class ClipAnswer:
    """The scores of one question about one object in one frame.

    Attributes:
        key: Key of the video.
        frame: Number of the frame in the video.
        object_id: Id of the object.
        phrase: The phrase that was asked.
        j: Region similarity J (IoU) of the predicted mask, 0..1.
        f: Boundary F-measure of the predicted mask, 0..1.
        groups: The question's groups of ``GROUPS``, without ``ALL``.
    """

    key: str
    frame: int
    object_id: int
    phrase: str
    j: float
    f: float
    groups: tuple[str, ...]


@dataclass(frozen=True)
class ClipScores:
    """The scores of all questions.

    Attributes:
        memory: Memory that the model had.
        answers: One entry per question, in the order of videos, frames and objects.
        skipped: Videos that could not be used.
    """

    memory: Kind
    answers: tuple[ClipAnswer, ...]
    skipped: tuple[BadInput, ...]

    def summary(self, group: str = ALL) -> dict[str, float]:
        """Average the scores of one group.

        Args:
            group: One of ``GROUPS``.

        Returns:
            ``j`` and ``f``, means over the group's questions; ``jf``, the mean of both; ``count``, the number of
            questions. Empty if the group has no question.
        """
        own = [answer for answer in self.answers if group == ALL or group in answer.groups]
        if not own:
            return {}
        j, f = float(np.mean([answer.j for answer in own])), float(np.mean([answer.f for answer in own]))
        return {"jf": (j + f) / 2, "j": j, "f": f, "count": float(len(own))}

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values.

        Returns:
            The memory, the mean scores of each group that has a question, and the skipped videos. Single answers are
            not included.
        """
        return {
            "memory": self.memory,
            "groups": {group: figures for group in GROUPS if (figures := self.summary(group))},
            "skipped": [{"key": bad.key, "reason": bad.reason} for bad in self.skipped],
        }
