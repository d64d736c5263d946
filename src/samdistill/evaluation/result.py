"""What an evaluation found: one row per model, as data, as a table for the terminal and as pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from jaxtyping import UInt8
from rich.markup import escape
from rich.table import Table

from ..data.skipped import BadInput
from .result_story import ASKED, PROMPT_NOTE, Tile, encoder_headline, encoder_tiles
from .rows import EMBEDDING, ModelRow
from .verdict import Score

DASH = "-"


class Named(Protocol):
    """What every row has."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


@dataclass(frozen=True)
class Panel:
    """One model's masks drawn on a picture.

    iou: mean over the objects drawn, against ``Picture.against``. found: how many instances are drawn, where a model
    could find any number, none included.
    """

    title: str
    image: UInt8[np.ndarray, "h w 3"]
    iou: float | None = None
    found: int | None = None


@dataclass(frozen=True)
class Picture:
    """One image of the data set and the masks of everybody for the same prompts: a prompt kind, or a phrase."""

    key: str
    prompt: str
    against: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Conditions:
    """Where and how the timings were taken."""

    device: str
    threads: int
    repeats: int
    image_size: int


@dataclass(frozen=True)
class Measure:
    """One line of the table: its group, its name in the group, and its text for each model (``DASH``: not measured)."""

    group: str
    name: str
    cells: list[str]


class Evaluation(ABC, Generic[Row]):
    """What the table on the terminal and the report need of any kind of evaluation. A subclass is a dataclass.

    rows: one per model, in the order the models were given. teacher: the row that the others are compared with, if any.
    skipped: inputs that could not be used, with the reason. pictures_note: how the pictures were chosen.
    """

    rows: tuple[Row, ...]
    teacher: str | None
    skipped: tuple[BadInput, ...]
    pictures: tuple[Picture, ...]
    pictures_note: ClassVar[str]

    @property
    def names(self) -> list[str]:
        return [row.name for row in self.rows]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def compared(self, start: str | None) -> tuple[Row | None, Row | None]:
        """The teacher and the student before its training, as far as there are."""
        rows = {row.name: row for row in self.rows}
        return rows.get(self.teacher or ""), rows.get(start or "")

    @property
    @abstractmethod
    def note(self) -> str:
        """What the figures mean, for the foot of their table; may be empty."""

    @abstractmethod
    def measures(self) -> list[Measure]:
        """What was measured, in reading order; each with one text per model. What no model has is left out."""

    @abstractmethod
    def caption(self) -> str:
        """One sentence on what the rows were measured on."""

    @abstractmethod
    def headline(self, student: str, start: str | None) -> str:
        """The result for the row named ``student`` in a sentence or two."""

    @abstractmethod
    def score(self, name: str) -> Score | None:
        """The main figure of the row called ``name``; None where it has none."""

    @abstractmethod
    def tiles(self, student: str, start: str | None) -> list[Tile]:
        """A few figures of the row named ``student``."""

    def table(self) -> Table:
        """For the terminal (rich): a column per model, a line per measure, so that it fits 80 characters."""
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
    """Rows in the order the models were given, and what they were measured on.

    teacher: the row that the others are compared with, if any. labelled: the objects are the annotated ones; else those
    the teacher itself segments. objects: how many were asked for; objects_left_out: empty at the canvas' resolution,
    or above the limit per image. skipped: inputs that could not be read, with the reason.
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
    pictures_note = (
        "The first images that have objects, not a selection. All models get the same prompts; each object keeps its "
        "colour."
    )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and mappings; everything but the pictures."""
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
        """What was measured, in reading order; each with one text per model. What no model has is left out."""
        rows = self.rows
        found = [
            Measure("cost", "trunk parameters", [f"{row.trunk_parameters / 1e6:.2f} M" for row in rows]),
            Measure("cost", "all parameters", [f"{row.parameters / 1e6:.2f} M" for row in rows]),
            Measure("cost", "trunk GFLOP per image", [_text(row.trunk_gflops, ".3g") for row in rows]),
            Measure("cost", "encoder latency", [_text(row.latency_ms, ".3g", " ms") for row in rows]),
            *([Measure("features", "of the", [row.compared or DASH for row in rows])] if self._embeddings else []),
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
        """Whether other features than the trunks' were compared, which the table then says."""
        return any(row.compared == EMBEDDING for row in self.rows)

    def caption(self) -> str:
        """One sentence on what the rows were measured on."""
        said = "" if self.labelled else " that the teacher itself segments"
        text = count(self.images, "image")
        if self.objects:
            text += f", {count(self.objects, 'object')}{said}"
        elif self.prompts:
            text += ", no object to ask for"
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
        for kind in self.prompts:
            for label, values in (("mIoU", row.miou), ("IoU with the teacher's masks", row.agreement)):
                if kind in values:
                    return Score(f"{label} {ASKED[kind]}", values[kind], self.objects)
        return None

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
    """1, "run" -> "1 run"; 2, "run" -> "2 runs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
