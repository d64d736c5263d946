"""Decide whether training improved a student, from its score and the uncertainty of the score.

The uncertainty is the standard error of the difference of two models on the same data. It is estimated by the jackknife
over images or videos, since the objects of one image are not independent: the figure is computed again with each image
left out. This applies to any figure, also to cgF1, which is no mean.

Source:
    Efron and Stein, The Jackknife Estimate of Variance, The Annals of Statistics 9 (3), 1981.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scipy.special import stdtrit

CONFIDENCE = 0.95
"""Confidence of the interval outside of which a difference counts (two-sided, Student's t)."""


@dataclass(frozen=True)
class Score:
    """Main figure of one model.

    Attributes:
        name: Name of the figure.
        value: The figure.
        measured_on: Number and kind of the items, such as ``12 objects in 4 images``.
        without: The figure without one image or video, by the name of the omitted one. May be empty; ``doubt`` is None
            then.
    """

    name: str
    value: float
    measured_on: str
    without: Mapping[str, float] = field(default_factory=dict)


def means_without(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Compute the mean of all values without each group, for ``Score.without``.

    Args:
        groups: Values by group, such as those of the objects by image.

    Returns:
        The means by group. A group that has all values or none is left out.

    Example:
        >>> means_without({"a": [1.0, 0.0], "b": [0.5]})
        {'a': 0.5, 'b': 0.5}
    """
    total, count = math.fsum(value for group in groups.values() for value in group), sum(map(len, groups.values()))
    return {
        name: (total - math.fsum(group)) / (count - len(group))
        for name, group in groups.items()
        if 0 < len(group) < count
    }


def doubt(first: Score, second: Score) -> float | None:
    """Half width of the confidence interval of the difference of two scores on the same images or videos.

    An image or video that only one of the models could be measured on is not left out in turn.

    Returns:
        The half width, or None if the scores have fewer than two images or videos in common.
    """
    differences = [value - second.without[name] for name, value in first.without.items() if name in second.without]
    count = len(differences)
    if count < 2:
        return None
    mean = math.fsum(differences) / count
    error = math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in differences))
    return float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error


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

    A difference counts if it exceeds ``doubt``, so the same images or videos are compared with themselves.

    Args:
        student: Score of the student after training.
        start: Score before training, or None.
        teacher: Score of the teacher, or None.
        about: Properties of the run.

    Returns:
        One or more sentences. They begin with "Learned:" if the student improved, and with "Measured:" if there is
        nothing to compare it with, or too few images or videos.
    """
    reached = f"{student.name} {student.value:.3f} on {student.measured_on}"
    theirs = "" if teacher is None else f", teacher {teacher.value:.3f}"
    if start is None:
        return f"Measured: {reached}{theirs}."
    figures = f"{reached}, {start.value:.3f} before training{theirs}"
    least = doubt(student, start)
    if least is None:
        return f"Measured: {figures}. This is too little data to tell whether the student improved: evaluate on more."
    figures += f"; differences below {least:.3f} are not significant"
    difference = student.value - start.value
    if difference > least:
        return f"Learned: {figures}."
    state = "Worse than before training" if difference < -least else "No better than before training"
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
