"""Sentences and tiles that summarise a result at the top of a report.

In this file, ``start`` is the row of the student before training. Its name is "untrained" or "untuned".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .rows import ConceptRow, ModelRow

ASKED = {
    "box": "with a box prompt", "point": "with one click", "refine": "with a corrected click",
    "refine2": "with two corrected clicks",
}  # fmt: skip
PROMPT_NOTE = (
    "Box: the object's tight box. Point: one click at its centre. Refine: the same click, then a second one that "
    "corrects the model's error."
)
CONCEPT_NOTE = (
    "cgF1 is pmF1 times IL_MCC. pmF1: F1 of the masks where the concept is in the image, mean over IoU 0.50 to 0.95. "
    "IL_MCC: how well a model tells whether the concept is in the image, a correlation from -1 to 1. Mask AP: COCO's "
    "average precision, without a score threshold."
)


class Tile(NamedTuple):
    """An important figure.

    Attributes:
        label: Name of the figure.
        value: The figure with its unit.
        note: A value to compare with; may be empty.
    """

    label: str
    value: str
    note: str


def encoder_headline(
    prompts: Sequence[str], student: ModelRow, teacher: ModelRow | None, start: ModelRow | None
) -> str:
    """Summarise the result in one or two sentences. Figures that were not measured are omitted."""
    kind = next((k for k in prompts if k in student.kept or k in student.agreement), None)
    asked = ASKED.get(kind or "", "")
    said = ""
    if kind is not None and kind in student.kept and teacher is not None:
        said = (
            f"The distilled student keeps {student.kept[kind]:.1%} of the teacher's mIoU {asked} "
            f"({student.miou[kind]:.3f} of {teacher.miou[kind]:.3f})"
        )
        if start is not None and kind in start.kept:
            said += f"; {start.name}, it keeps {start.kept[kind]:.1%}"
    elif kind is not None:
        said = (
            f"The distilled student's masks agree with the teacher's at an IoU of {student.agreement[kind]:.3f} {asked}"
        )
        if start is not None and kind in start.agreement:
            said += f"; {start.name}, at {start.agreement[kind]:.3f}"
    elif student.cosine is not None:
        said = f"The distilled student's features reach a cosine of {student.cosine:.3f} with the teacher's"
    cost = []
    if teacher is not None:
        words = ("smaller", "larger", "as large as the teacher's")
        cost.append(f"Its trunk is {_times(teacher.trunk_parameters, student.trunk_parameters, *words)}")
        if student.latency_ms and teacher.latency_ms:
            words = ("faster", "slower", "as fast as the teacher's")
            cost.append(f"its vision encoder {_times(teacher.latency_ms, student.latency_ms, *words)}")
    return _sentences(said, " and ".join(cost))


def encoder_tiles(
    prompts: Sequence[str], student: ModelRow, teacher: ModelRow | None, start: ModelRow | None
) -> list[Tile]:
    """Return one tile per prompt kind, then parameters and latency."""
    found = []
    for kind in prompts:
        if kind in student.kept:
            note = f"mIoU {student.miou[kind]:.3f}"
            if start is not None and kind in start.kept:
                note = f"{start.name} {start.kept[kind]:.1%}"
            found.append(Tile(f"of the teacher's mIoU, {kind}", f"{student.kept[kind]:.1%}", note))
        elif kind in student.agreement:
            note = ""
            if start is not None and kind in start.agreement:
                note = f"{start.name} {start.agreement[kind]:.3f}"
            found.append(Tile(f"IoU with the teacher, {kind}", f"{student.agreement[kind]:.3f}", note))
    found.append(_millions("trunk parameters", student.trunk_parameters, teacher and teacher.trunk_parameters))
    if student.latency_ms is not None:
        found.append(_milliseconds("encoder latency", student.latency_ms, teacher and teacher.latency_ms))
    return found


def concept_headline(student: ConceptRow, teacher: ConceptRow | None, start: ConceptRow | None) -> str:
    """Summarise the result in one or two sentences. Figures that were not measured are omitted."""
    if student.kept is not None and teacher is not None:
        said = (
            f"The distilled student keeps {_share(student.kept)} of the teacher's cgF1 "
            f"({student.cgf1:.3f} of {teacher.cgf1:.3f})"
        )
        if start is not None and start.kept is not None:
            said += f"; {start.name}, it keeps {_share(start.kept)}"
    else:
        said = f"The distilled student reaches a cgF1 of {student.cgf1:.3f}"
        if start is not None:
            said += f"; {start.name}, {start.cgf1:.3f}"
    cost = []
    if teacher is not None and student.parameters and teacher.parameters:
        words = ("fewer parameters", "more parameters", "as many parameters as the teacher")
        cost.append(f"has {_times(teacher.parameters, student.parameters, *words)}")
    if teacher is not None and student.latency_ms and teacher.latency_ms:
        words = ("faster", "slower", "as fast as the teacher")
        cost.append(f"answers {_times(teacher.latency_ms, student.latency_ms, *words)}")
    return _sentences(said, f"It {' and '.join(cost)}" if cost else "")


def concept_tiles(student: ConceptRow, teacher: ConceptRow | None, start: ConceptRow | None) -> list[Tile]:
    """Return tiles of cgF1, its factors, mask AP, parameters and latency: six at most."""
    found = []
    if student.kept is not None:
        note = f"cgF1 {student.cgf1:.3f}"
        if start is not None and start.kept is not None:
            note = f"{start.name} {_share(start.kept)}"
        found.append(Tile("of the teacher's cgF1", _share(student.kept), note))
    else:
        found.append(_figure("cgF1", student.cgf1, teacher and teacher.cgf1))
    found.append(_figure("pmF1", student.pmf1, teacher and teacher.pmf1))
    found.append(_figure("IL_MCC", student.il_mcc, teacher and teacher.il_mcc))
    if student.mask_ap is not None:
        found.append(_figure("mask AP", student.mask_ap, teacher and teacher.mask_ap))
    if student.parameters is not None:
        found.append(_millions("parameters", student.parameters, teacher and teacher.parameters))
    if student.latency_ms is not None:
        found.append(_milliseconds("latency per question", student.latency_ms, teacher and teacher.latency_ms))
    return found


def _times(reference: float, value: float, less: str, more: str, same: str) -> str:
    if 0.95 < reference / value < 1.05:
        return same
    large, word = (reference / value, less) if reference > value else (value / reference, more)
    return f"{large:.1f} times {word}"


def _share(value: float) -> str:
    """Format a fraction of cgF1 in percent. cgF1 can be negative, which is shown as 0 %."""
    return f"{max(0.0, value):.1%}"


def _sentences(*parts: str) -> str:
    return " ".join(f"{part}." for part in parts if part)


def _figure(label: str, value: float, teacher: float | None) -> Tile:
    return Tile(label, f"{value:.3f}", "" if teacher is None else f"teacher {teacher:.3f}")


def _millions(label: str, value: int, teacher: int | None) -> Tile:
    return Tile(label, f"{value / 1e6:.2f} M", f"teacher {teacher / 1e6:.2f} M" if teacher else "")


def _milliseconds(label: str, value: float, teacher: float | None) -> Tile:
    return Tile(label, f"{value:.3g} ms", f"teacher {teacher:.3g} ms" if teacher else "")
