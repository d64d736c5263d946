"""Configuration of what is asked of an image in words or by showing a box."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .parts import Fraction, Positive, Strict


class QuestionsConfig(Strict):
    """What is asked of an image. The same questions go to the teacher and the student."""

    source: Literal["generic", "jsonl", "names"] = "generic"
    """generic: the list below. jsonl: a file of phrases or captions per image. names: what the data set calls its
    objects (COCO's categories, the sandbox's concepts)."""
    generic: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "object", "thing", "item", "person", "animal", "vehicle", "furniture", "food", "plant", "building",
    )  # fmt: skip
    file: Path | None = None
    """The jsonl: one ``{"key": ..., "phrases": [...]}`` or ``{"key": ..., "caption": ...}`` a line."""
    per_image: Positive = 1
    negatives: Fraction = 0.0
    """Share of the questions in words that ask for something absent: a phrase of other images."""
    boxes: Fraction = 0.0
    """Share of the questions that show an annotated object's box in place of words."""
    jitter: Annotated[float, Field(ge=0, lt=0.5)] = 0.05
    """Standard deviation of a shown box's edges, as a share of its sides."""

    @model_validator(mode="after")
    def _fits_source(self) -> QuestionsConfig:
        if (self.file is not None) != (self.source == "jsonl"):
            raise ValueError("'file' goes with source: jsonl, and only with that")
        if self.negatives and self.source == "generic":
            raise ValueError("generic phrases have no images of their own, so none is known to be absent: negatives: 0")
        return self
