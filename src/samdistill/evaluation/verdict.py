"""Decide whether training improved a student, from its score and the uncertainty of the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Main figure of one model.

    Attributes:
        name: Name of the figure.
        value: Value in 0..1. A negative value counts as 0 in ``error``.
        items: Number of objects or questions over which it is a mean.
    """

    name: str
    value: float
    items: int

    @property
    def error(self) -> float:
        """Upper bound of the standard error.

        Values in 0..1 with a given mean have the largest variance if all of them are 0 or 1.
        """
        share = min(max(self.value, 0.0), 1.0)
        return (share * (1 - share) / max(self.items, 1)) ** 0.5


@dataclass(frozen=True)
class Circumstances:
    """Properties of a run that can explain why training did not help.

    Attributes:
        steps: Steps of the optimiser.
        images: Training images or videos.
        rate_share: Peak learning rate divided by the recipe's. It is below 1 if ``train.lr_batch`` lowers the rate.
    """

    steps: int
    images: int
    rate_share: float = 1.0


FEW_STEPS, FEW_IMAGES, SMALL_RATE, POOR_TEACHER = 200, 50, 0.1, 0.3


def verdict(student: Score, start: Score | None, teacher: Score | None, about: Circumstances) -> str:
    """State whether the student improved, and if not, the likely reasons and what to try.

    A difference counts if it exceeds twice its standard error, which is bounded by ``Score.error``.

    Args:
        student: Score of the student after training.
        start: Score before training, or None.
        teacher: Score of the teacher, or None.
        about: Properties of the run.

    Returns:
        One or more sentences. They begin with "Learned:" if the student improved.
    """
    reached = f"{student.name} {student.value:.3f} on {student.items} items"
    theirs = "" if teacher is None else f", teacher {teacher.value:.3f}"
    if start is None:
        return f"Measured: {reached}{theirs}."
    doubt = 2 * (student.error**2 + start.error**2) ** 0.5
    figures = f"{reached}, {start.value:.3f} before training{theirs}; differences below {doubt:.3f} are not significant"
    difference = student.value - start.value
    if difference > doubt:
        return f"Learned: {figures}."
    state = "Worse than before training" if difference < -doubt else "No better than before training"
    return f"{state}: {figures}. {' '.join(_reasons(teacher, about))}"


def _reasons(teacher: Score | None, about: Circumstances) -> Sequence[str]:
    """List the reasons, most likely first."""
    found = list[str]()
    if teacher is not None and teacher.value < POOR_TEACHER:
        found.append(
            f"The teacher itself reaches {teacher.value:.3f}: it is not suited to these images; use another teacher."
        )
    if about.images < FEW_IMAGES:
        found.append(f"Training used only {about.images} images: add more.")
    if about.steps < FEW_STEPS:
        found.append(f"Training ran only {about.steps} steps: raise train.epochs.")
    if about.rate_share < SMALL_RATE:
        found.append(
            f"train.lr_batch makes the rate {about.rate_share:.2g} of the recipe's: set train.lr_batch=null or "
            "raise train.lr."
        )
    return found or ["Raise train.epochs or train.lr, and look at the curves of the terms."]
