"""Results of detectors on (image, phrase) pairs: values, a table for the terminal, and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.saco_predictions import IouKind, PredictedInstance
from ..data.skipped import BadInput
from ..metrics.concepts import ConceptScores
from .result import DASH, Conditions, Evaluation, Measure, Picture, count
from .result_story import CONCEPT_NOTE, Tile, concept_headline, concept_tiles
from .rows import ConceptRow
from .verdict import Score

Found = dict[int, list[PredictedInstance]]
"""Predictions of a model by the id of the pair, in descending order of score."""


@dataclass(frozen=True)
class ConceptResult(Evaluation[ConceptRow]):
    """Figures of detectors on one set of (image, phrase) pairs, in the order in which the models were given.

    Attributes:
        rows: One row per model.
        teacher: Name of the model that the others are compared with, or None.
        threshold: Minimum score of a prediction, for all figures except ``mask_ap``.
        images, questions: Numbers of images and of pairs.
        positives: Number of pairs whose phrase has at least one object in the image.
        conditions: How latency was measured, or None if it was not.
        skipped: Inputs that could not be used, with the reason.
        predictions: Predictions by model, for ``data.saco_predictions.write_predictions``.
        figures: All figures of ``ConceptScores.summary`` by model.
        annotators: Number of ground-truth files. For each pair, the annotator with the best result counts.
        iou: Whether masks or boxes were compared.
        scores: Counts of cgF1 by model and image file.
    """

    rows: tuple[ConceptRow, ...]
    teacher: str | None
    threshold: float
    images: int
    questions: int
    positives: int
    conditions: Conditions | None
    skipped: tuple[BadInput, ...]
    pictures: tuple[Picture, ...]
    predictions: Mapping[str, Found]
    figures: Mapping[str, Mapping[str, float]]
    annotators: int = 1
    iou: IouKind = "masks"
    scores: Mapping[str, Mapping[Path, ConceptScores]] = field(default_factory=dict)

    pictures_note = (
        "Questions spread over the file, the last for something that is not there. Boxes are drawn around the masks; "
        "colours go by score, the same for every model."
    )

    def to_dict(self) -> dict[str, Any]:
        """Return values for JSON, without the pictures and the predictions."""
        return {
            "teacher": self.teacher,
            "threshold": self.threshold,
            "images": self.images,
            "questions": self.questions,
            "positives": self.positives,
            "annotators": self.annotators,
            "iou": self.iou,
            "figures": {name: dict(each) for name, each in self.figures.items()},
            "models": [asdict(row) for row in self.rows],
            "timing": None if self.conditions is None else asdict(self.conditions),
            "skipped": [{"key": bad.key, "reason": bad.reason} for bad in self.skipped],
        }

    def measures(self) -> list[Measure]:
        """Return the figures in reading order, with one text per model. Figures that no model has are left out."""

        def line(group: str, name: str, field: str, form: str, scale: float = 1.0, unit: str = "") -> Measure:
            values = [getattr(row, field) for row in self.rows]
            return Measure(group, name, [DASH if v is None else format(v * scale, form) + unit for v in values])

        found = [
            line("cost", "parameters", "parameters", ".2f", 1e-6, " M"),
            line("cost", "latency per question", "latency_ms", ".3g", 1.0, " ms"),
            line("concepts", "cgF1", "cgf1", ".3f"),
            line("concepts", "pmF1", "pmf1", ".3f"),
            line("concepts", "IL_MCC", "il_mcc", ".3f"),
            line("concepts", "F1 at IoU 0.50", "f1_50", ".3f"),
            line("concepts", "F1 at IoU 0.75", "f1_75", ".3f"),
            line("concepts", "mask AP", "mask_ap", ".3f"),
            line("concepts", "share of the teacher's cgF1", "kept", ".1f", 100.0, " %"),
        ]
        return [measure for measure in found if any(cell != DASH for cell in measure.cells)]

    def caption(self) -> str:
        """Return a sentence that describes the data and the conditions."""
        text = (
            f"{count(self.questions, 'question')} about {count(self.images, 'image')}, {self.positives} for something "
            f"that is there; scores from {self.threshold:g}"
        )
        if self.annotators > 1:
            text += f"; the best of {self.annotators} annotators counts"
        if self.iou == "boxes":
            text += "; boxes compared, not masks"
        if self.skipped:
            text += f"; {count(len(self.skipped), 'input')} skipped"
        if self.conditions is not None:
            on = self.conditions
            text += f"; latency: {on.device}, {count(on.threads, 'thread')}, median of {count(on.repeats, 'run')}"
        return text + "."

    @property
    def note(self) -> str:
        return CONCEPT_NOTE

    def score(self, name: str) -> Score:
        by_image = self.scores.get(name, {})
        whole = ConceptScores.merge(by_image.values())
        without = {str(file): whole.without(part).summary().get("cgf1", 0.0) for file, part in by_image.items()}
        asked = f"{count(self.questions, 'question')} about {count(self.images, 'image')}"
        return Score("cgF1", self.row(name).cgf1, asked, without)

    def headline(self, student: str, start: str | None) -> str:
        return concept_headline(self.row(student), *self.compared(start))

    def tiles(self, student: str, start: str | None) -> list[Tile]:
        return concept_tiles(self.row(student), *self.compared(start))
