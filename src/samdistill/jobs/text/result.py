"""Results of text encoders on phrases, for the table and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...data import BadInput
from ...evaluation.concept_result import ConceptResult
from ...evaluation.result import DASH, Evaluation, Measure, Picture, count
from ...evaluation.result_story import CONCEPT_NOTE, Tile
from ...evaluation.verdict import Score, means_without

LENGTHS = ((1, 1), (2, 2), (3, 4), (5, None))
"""Ranges of the number of words of a phrase, for the figures by length."""
RARITIES = ((0, 0), (1, 9), (10, 99), (100, None))
"""Ranges of the number of training phrases that have the rarest word of a phrase, for the figures by rarity."""
MOST_CONFUSED = 5
"""Pairs of confused phrases that the report names."""


@dataclass(frozen=True)
class Confused:
    """A phrase whose end token is closer to that of another phrase.

    Attributes:
        phrase: The phrase that the student encoded.
        nearest: The phrase whose tokens of the teacher are nearest.
        cosine: Cosine of their end tokens.
        own: Cosine with the teacher's end token of the phrase itself.
    """

    phrase: str
    nearest: str
    cosine: float
    own: float


@dataclass(frozen=True)
class TextRow:
    """Figures of one text encoder on phrases that were not trained on.

    Attributes:
        name: Name of the model.
        parameters: Parameters of the text encoder and the projection.
        cosine: Cosine with the teacher's tokens, mean over the tokens of a phrase, then over phrases.
        pooled_cosine: Cosine of the end tokens, mean over phrases.
        mse: Squared error per channel, averaged as ``cosine``.
        own_nearest: Share of phrases whose end token is nearest to the teacher's of the same phrase, among all phrases.
        by_length: ``cosine`` by number of words.
        by_rarity: ``cosine`` by number of training phrases with the rarest word.
        cgf1: cgF1 with the teacher's vision encoder and heads, on all questions. None if there are none.
        cgf1_new: The same on questions whose phrase was not trained on.
        kept: ``cgf1`` divided by the teacher's.
        kept_new: ``cgf1_new`` divided by the teacher's.
    """

    name: str
    parameters: int
    cosine: float
    pooled_cosine: float
    mse: float
    own_nearest: float
    by_length: Mapping[str, float] = field(default_factory=dict)
    by_rarity: Mapping[str, float] = field(default_factory=dict)
    cgf1: float | None = None
    cgf1_new: float | None = None
    kept: float | None = None
    kept_new: float | None = None


@dataclass(frozen=True)
class TextResult(Evaluation[TextRow]):
    """Figures of text encoders, in the order in which the models were given.

    Attributes:
        rows: One row per model.
        teacher: Name of the teacher's row.
        phrases: Number of evaluated phrases.
        candidates: Number of phrases among which the nearest one is found.
        excluded: Number of phrases of the sources that were not trained on because an evaluation set has them.
        trained: Number of phrases that were trained on.
        confused: Confused phrases by model, the worst first.
        cosines: Cosine of each phrase by model.
        concepts: Result on questions about images, or None.
        new_questions: Number of questions whose phrase was not trained on.
        composed: Number of phrases composed of words that were trained on too.
        untaught: Evaluated phrases with a token that no trained phrase has.
    """

    rows: tuple[TextRow, ...]
    teacher: str | None
    phrases: int
    candidates: int
    excluded: int
    trained: int
    confused: Mapping[str, tuple[Confused, ...]]
    cosines: Mapping[str, Mapping[str, float]]
    concepts: ConceptResult | None = None
    new_questions: int = 0
    composed: int = 0
    untaught: tuple[str, ...] = ()
    skipped: tuple[BadInput, ...] = ()
    pictures: tuple[Picture, ...] = ()

    pictures_note = ConceptResult.pictures_note

    def to_dict(self) -> dict[str, Any]:
        """Return values for JSON, without the pictures and the predictions."""
        return {
            "teacher": self.teacher, "phrases": self.phrases, "candidates": self.candidates,
            "excluded": self.excluded, "trained": self.trained, "new_questions": self.new_questions,
            "composed": self.composed, "untaught": list(self.untaught),
            "models": [asdict(row) for row in self.rows],
            "confused": {name: [asdict(one) for one in found] for name, found in self.confused.items()},
            "concepts": None if self.concepts is None else self.concepts.to_dict(),
            "skipped": [{"key": bad.key, "reason": bad.reason} for bad in self.skipped],
        }  # fmt: skip

    def measures(self) -> list[Measure]:
        """Return the figures in reading order. Figures that no model has are left out."""

        def line(group: str, name: str, values: list[float | None], form: str = ".3f", unit: str = "") -> Measure:
            return Measure(group, name, [DASH if v is None else format(v, form) + unit for v in values])

        def of(name: str, scale: float = 1.0) -> list[float | None]:
            found = [getattr(row, name) for row in self.rows]
            return [None if value is None else value * scale for value in found]

        measures = [
            line("cost", "parameters", of("parameters", 1e-6), ".3f", " M"),
            line("tokens", "cosine", of("cosine")),
            line("tokens", "cosine of the end token", of("pooled_cosine")),
            line("tokens", "squared error", of("mse"), ".3g"),
            line("tokens", "nearest to itself", of("own_nearest", 100), ".1f", " %"),
        ]
        for group, field_name in (("cosine by words", "by_length"), ("cosine by rarest word", "by_rarity")):
            names = {name: None for row in self.rows for name in getattr(row, field_name)}
            measures += [line(group, name, [getattr(row, field_name).get(name) for row in self.rows]) for name in names]
        measures += [
            line("concepts", "cgF1", of("cgf1")),
            line("concepts", "share of the teacher's", of("kept", 100), ".1f", " %"),
            line("concepts", "cgF1, new phrases", of("cgf1_new")),
            line("concepts", "share of the teacher's, new phrases", of("kept_new", 100), ".1f", " %"),
        ]
        return [measure for measure in measures if any(cell != DASH for cell in measure.cells)]

    def caption(self) -> str:
        text = (
            f"{count(self.phrases, 'phrase')} that were not trained on; {self.trained} and {self.composed} composed "
            f"ones were, {self.excluded} more are in the evaluation sets and were kept out; the nearest phrase is one "
            f"of {self.candidates}"
        )
        if self.concepts is not None:
            text += (
                f"; cgF1: {count(self.concepts.questions, 'question')} about "
                f"{count(self.concepts.images, 'image')}, {self.new_questions} with a phrase that was not trained on"
            )
        return f"{text}."

    @property
    def note(self) -> str:
        text = "The teacher's tokens are compared after the projection to the width of its heads."
        pairs = [
            f"{name}: " + ", ".join(f"{one.phrase!r} is nearest to {one.nearest!r}" for one in found[:MOST_CONFUSED])
            for name, found in self.confused.items()
            if found
        ]
        if pairs:
            text += f" Confused phrases, {'; '.join(pairs)}."
        if self.untaught:
            some = ", ".join(map(repr, self.untaught[:MOST_CONFUSED]))
            text += f" Phrases with a word that was not trained on ({len(self.untaught)}): {some}."
        return text if self.concepts is None else f"{text} {CONCEPT_NOTE}"

    def score(self, name: str) -> Score:
        groups = {phrase: (cosine,) for phrase, cosine in self.cosines[name].items()}
        return Score("cosine", self.row(name).cosine, f"{count(self.phrases, 'phrase')} that were not trained on",
                     means_without(groups))  # fmt: skip

    def headline(self, student: str, start: str | None) -> str:
        row, (teacher, before) = self.row(student), self.compared(start)
        said = f"The small text encoder's tokens have a cosine of {row.cosine:.3f} with the teacher's"
        if before is not None:
            said += f" ({before.cosine:.3f} before training)"
        if row.kept_new is not None:
            said += f"; with the teacher's heads it keeps {row.kept_new:.1%} of the cgF1 on phrases not trained on"
        if teacher is not None:
            said += f". It has {teacher.parameters / row.parameters:.1f} times fewer parameters"
        return f"{said}."

    def tiles(self, student: str, start: str | None) -> list[Tile]:
        row, (teacher, before) = self.row(student), self.compared(start)
        found = [
            Tile("cosine of tokens", f"{row.cosine:.3f}", "" if before is None else f"{start} {before.cosine:.3f}"),
            Tile("nearest to itself", f"{row.own_nearest:.1%}", "" if before is None else
                 f"{start} {before.own_nearest:.1%}"),
        ]  # fmt: skip
        if row.kept_new is not None:
            found.append(Tile("of the teacher's cgF1, new phrases", f"{row.kept_new:.1%}", f"cgF1 {row.cgf1_new:.3f}"))
        if row.kept is not None:
            found.append(Tile("of the teacher's cgF1", f"{row.kept:.1%}", f"cgF1 {row.cgf1:.3f}"))
        note = "" if teacher is None else f"teacher {teacher.parameters / 1e6:.2f} M"
        return [*found, Tile("parameters", f"{row.parameters / 1e6:.2f} M", note)]


def range_name(bounds: tuple[int, int | None], unit: str) -> str:
    """Return the name of a range of counts: ``1 word``, ``3 to 4 words``, ``5 words or more``."""
    low, high = bounds
    plural = unit if bounds == (1, 1) else f"{unit}s"
    if high is None:
        return f"{low} {plural} or more"
    return f"{low} {plural}" if low == high else f"{low} to {high} {plural}"
