"""Whether a run taught its student anything: one sentence from the figures and their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """The main figure of one model, in 0..1 (negative counts as 0). name: of the figure. items: objects, questions or
    the like that it is a mean over."""

    name: str
    value: float
    items: int

    @property
    def error(self) -> float:
        """Bound of its standard error: numbers in 0..1 with this mean vary at most as yes and no do."""
        share = min(max(self.value, 0.0), 1.0)
        return (share * (1 - share) / max(self.items, 1)) ** 0.5


@dataclass(frozen=True)
class Circumstances:
    """What may explain a run without success. steps: of the optimiser. images: or videos, trained on. rate_share: the
    run's peak rate over the recipe's, below 1 where ``train.lr_batch`` lowers it."""

    steps: int
    images: int
    rate_share: float = 1.0


FEW_STEPS, FEW_IMAGES, SMALL_RATE, POOR_TEACHER = 200, 50, 0.1, 0.3


def verdict(student: Score, start: Score | None, teacher: Score | None, about: Circumstances) -> str:
    """``Learned: ...``, or that the student is no better than its start, with the likely reason and what to try.

    A difference counts where it is more than twice its standard error, for which ``Score.error`` is the bound.
    """
    reached = f"{student.name} {student.value:.3f} on {student.items} items"
    theirs = "" if teacher is None else f", the teacher's {teacher.value:.3f}"
    if start is None:
        return f"Measured: {reached}{theirs}."
    doubt = 2 * (student.error**2 + start.error**2) ** 0.5
    figures = f"{reached}, {start.value:.3f} before training{theirs}; differences below {doubt:.3f} are chance"
    difference = student.value - start.value
    if difference > doubt:
        return f"Learned: {figures}."
    state = "Worse than before training" if difference < -doubt else "No better than before training"
    return f"{state}: {figures}. {' '.join(_reasons(teacher, about))}"


def _reasons(teacher: Score | None, about: Circumstances) -> Sequence[str]:
    """Likely first."""
    found = list[str]()
    if teacher is not None and teacher.value < POOR_TEACHER:
        found.append(f"The teacher itself reaches {teacher.value:.3f}: it hardly knows these images; take another one.")
    if about.images < FEW_IMAGES:
        found.append(f"{about.images} images are few: add some.")
    if about.steps < FEW_STEPS:
        found.append(f"{about.steps} steps are few: raise train.epochs.")
    if about.rate_share < SMALL_RATE:
        found.append(
            f"train.lr_batch makes the rate {about.rate_share:.2g} of the recipe's: set train.lr_batch=null or "
            "raise train.lr."
        )
    return found or ["Raise train.epochs or train.lr, and look at the curves of the terms."]
