"""Results of an evaluation with one row per model: values, a table for the terminal, and pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from jaxtyping import UInt8
from rich.markup import escape
from rich.table import Table

from ..data.skipped import BadInput
from .result_story import ASKED, PROMPT_NOTE, Tile, encoder_headline, encoder_tiles
from .rows import EMBEDDING, ModelRow
from .verdict import Score, means_without

DASH = "-"


class Named(Protocol):
    """A row with a name."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


@dataclass(frozen=True)
class Panel:
    """One image of a picture, with the masks of one model.

    Attributes:
        title: Name of the model, or of what is shown.
        image: RGB image, 0..255.
        iou: Mean IoU of the objects with those of ``Picture.against``, 0..1, or None.
        found: Number of instances in the panel, for models that find any number of instances; 0 is possible. None
            otherwise.
    """

    title: str
    image: UInt8[np.ndarray, "h w 3"]
    iou: float | None = None
    found: int | None = None


@dataclass(frozen=True)
class Picture:
    """One image of the data set with the masks of all models for the same prompts.

    Attributes:
        key: Key of the image.
        prompt: Prompt kind, or phrases.
        against: Title of the panel with which the others are compared.
        panels: The panels, from left to right.
    """

    key: str
    prompt: str
    against: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Conditions:
    """Conditions of a latency measurement.

    Attributes:
        device: Name of the device.
        threads: CPU threads of torch.
        repeats: Number of measurements.
        image_size: Side of the image in pixels.
    """

    device: str
    threads: int
    repeats: int
    image_size: int


@dataclass(frozen=True)
class Measure:
    """One line of the results table.

    Attributes:
        group: Heading of the group of lines.
        name: Name of the line.
        cells: Text for each model; ``DASH`` if it was not measured.
    """

    group: str
    name: str
    cells: list[str]


class Evaluation(ABC, Generic[Row]):
    """Base class of results, for the table on the terminal and for the report. Subclasses are dataclasses.

    Attributes:
        rows: One row per model, in the order in which the models were given.
        teacher: Name of the row with which the others are compared, or None.
        skipped: Inputs that could not be used, with the reason.
        pictures: Pictures for the report.
        pictures_note: Text that explains how the pictures were chosen.
    """

    rows: tuple[Row, ...]
    teacher: str | None
    skipped: tuple[BadInput, ...]
    pictures: tuple[Picture, ...]
    pictures_note: ClassVar[str]

    @property
    def names(self) -> list[str]:
        """Names of the rows."""
        return [row.name for row in self.rows]

    def row(self, name: str) -> Row:
        """Return the row called ``name``."""
        return next(row for row in self.rows if row.name == name)

    def compared(self, start: str | None) -> tuple[Row | None, Row | None]:
        """Return the rows of the teacher and of the student before training; None for a row that does not exist."""
        rows = {row.name: row for row in self.rows}
        return rows.get(self.teacher or ""), rows.get(start or "")

    @property
    @abstractmethod
    def note(self) -> str:
        """Explanation of the figures, shown below the table. It may be empty."""

    @abstractmethod
    def measures(self) -> list[Measure]:
        """Return the lines of the table in order. Lines without any value are omitted."""

    @abstractmethod
    def caption(self) -> str:
        """Return one sentence that describes what the models were measured on."""

    @abstractmethod
    def headline(self, student: str, start: str | None) -> str:
        """Describe the result in one or two sentences.

        Args:
            student: Name of the student's row.
            start: Name of the row of the student before training, or None.
        """

    @abstractmethod
    def score(self, name: str) -> Score | None:
        """Return the main figure of the row called ``name``, or None if it was not measured."""

    @abstractmethod
    def tiles(self, student: str, start: str | None) -> list[Tile]:
        """Return the most important figures of a row.

        Args:
            student: Name of the student's row.
            start: Name of the row of the student before training, or None.
        """

    def table(self) -> Table:
        """Return a rich table for the terminal. Models are columns and figures are lines, to fit 80 characters."""
        table = Table("", *map(escape, self.names), caption=self.caption(), caption_justify="left", caption_style="dim")
        for column in table.columns[1:]:
            column.justify = "right"
        group = ""
        for measure in self.measures():
            if measure.group != group:
                table.add_section()
                group = measure.group
                table.add_row(f"[bold]{group}[/bold]")
            table.add_row(f"  {measure.name}", *map(escape, measure.cells))
        return table


@dataclass(frozen=True)
class EvaluationResult(Evaluation[ModelRow]):
    """Results of models on images, by prompts and by features.

    Attributes:
        rows: One row per model, in the order in which the models were given.
        teacher: Name of the row with which the others are compared, or None.
        prompts: Prompt kinds that were measured.
        labelled: Whether the objects are annotated ones. Otherwise they are objects that the teacher segments.
        images: Number of images.
        objects: Number of objects.
        objects_left_out: Number of objects that were omitted, because they have no pixel on the canvas or exceed the
            limit per image.
        conditions: Conditions of the latency measurement, or None.
        skipped: Inputs that could not be read, with the reason.
        pictures: Pictures for the report.
        ious: IoU of each object, averaged over the prompt kinds, by model and key of the image. It is that with the
            ground truth if ``labelled``, and with the teacher's masks otherwise.
    """

    rows: tuple[ModelRow, ...]
    teacher: str | None
    prompts: tuple[str, ...]
    labelled: bool
    images: int
    objects: int
    objects_left_out: int
    conditions: Conditions | None
    skipped: tuple[BadInput, ...] = ()
    pictures: tuple[Picture, ...] = ()
    ious: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    pictures_note = (
        "The first images that have objects; they were not selected by result. All models get the same prompts. Each "
        "object has the same colour in all panels."
    )

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers, strings, lists and dicts. Pictures are not included."""
        return {
            "teacher": self.teacher,
            "labelled": self.labelled,
            "images": self.images,
            "objects": self.objects,
            "objects_left_out": self.objects_left_out,
            "prompts": list(self.prompts),
            "models": [{**asdict(row), **_plain(row)} for row in self.rows],
            "timing": None if self.conditions is None else asdict(self.conditions),
            "skipped": [{"key": bad.key, "reason": bad.reason} for bad in self.skipped],
        }

    def measures(self) -> list[Measure]:
        """Return the lines of the table in order. Lines without any value are omitted."""
        rows = self.rows
        found = [
            Measure("cost", "trunk parameters", [f"{row.trunk_parameters / 1e6:.2f} M" for row in rows]),
            Measure("cost", "all parameters", [f"{row.parameters / 1e6:.2f} M" for row in rows]),
            Measure("cost", "trunk GFLOP per image", [_text(row.trunk_gflops, ".3g") for row in rows]),
            Measure("cost", "encoder latency", [_text(row.latency_ms, ".3g", " ms") for row in rows]),
            *([Measure("features", "compared", [row.compared or DASH for row in rows])] if self._embeddings else []),
            Measure("features", "cosine", [_text(row.cosine, ".4f") for row in rows]),
            Measure("features", "MSE per element", [_text(row.mse, ".4g") for row in rows]),
        ]
        for kind in self.prompts:
            found.append(Measure("mIoU with ground truth", kind, [_text(row.miou.get(kind), ".3f") for row in rows]))
        for kind in self.prompts:
            found.append(Measure("share of the teacher's mIoU", kind, [_percent(row.kept.get(kind)) for row in rows]))
        for kind in self.prompts:
            cells = [_text(row.agreement.get(kind), ".3f") for row in rows]
            found.append(Measure("IoU with the teacher's masks", kind, cells))
        return [measure for measure in found if any(cell != DASH for cell in measure.cells)]

    @property
    def _embeddings(self) -> bool:
        """Whether a row compares image embeddings instead of trunk features. The table then names the features."""
        return any(row.compared == EMBEDDING for row in self.rows)

    def caption(self) -> str:
        """Return one sentence that describes what the models were measured on."""
        said = "" if self.labelled else " that the teacher itself segments"
        text = count(self.images, "image")
        if self.objects:
            text += f", {count(self.objects, 'object')}{said}"
        elif self.prompts:
            text += ", no objects"
        if self.objects_left_out:
            text += f" ({self.objects_left_out} left out)"
        if self.skipped:
            text += f", {count(len(self.skipped), 'unreadable input')} skipped"
        if self.conditions is not None:
            where = f"{self.conditions.device}, {count(self.conditions.threads, 'thread')}"
            text += (
                f"; latency: vision encoder, one {self.conditions.image_size} px image, {where}, "
                f"median of {count(self.conditions.repeats, 'run')}"
            )
        return text + "."

    @property
    def note(self) -> str:
        return PROMPT_NOTE if self.objects else ""

    def score(self, name: str) -> Score | None:
        row = self.row(name)
        values = row.miou if self.labelled else row.agreement
        if not values:
            return None
        label = "mIoU" if self.labelled else "IoU with the teacher's masks"
        kinds = [kind for kind in self.prompts if kind in values]
        asked = ASKED[kinds[0]] if len(kinds) == 1 else f"(mean of {', '.join(kinds)} prompts)"
        objects = f"{count(self.objects, 'object')} in {count(self.images, 'image')}"
        mean = sum(values[kind] for kind in kinds) / len(kinds)
        return Score(f"{label} {asked}", mean, objects, means_without(self.ious.get(name, {})))

    def headline(self, student: str, start: str | None) -> str:
        return encoder_headline(self.prompts, self.row(student), *self.compared(start))

    def tiles(self, student: str, start: str | None) -> list[Tile]:
        return encoder_tiles(self.prompts, self.row(student), *self.compared(start))


def _plain(row: ModelRow) -> dict[str, dict[str, float]]:
    return {name: dict(getattr(row, name)) for name in ("miou", "agreement", "kept")}


def _text(value: float | None, form: str, unit: str = "") -> str:
    return DASH if value is None else format(value, form) + unit


def _percent(value: float | None) -> str:
    return _text(None if value is None else 100 * value, ".1f", " %")


def count(number: int, noun: str) -> str:
    """Format a number with a noun: ``count(1, "run")`` is "1 run", ``count(2, "run")`` is "2 runs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
