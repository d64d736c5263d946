"""Configuration of concept prompts: phrases or exemplar boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .parts import Fraction, Positive, Strict


class QuestionsConfig(Strict):
    """Questions about an image. Teacher and student get the same ones."""

    source: Literal["generic", "jsonl", "names"] = "generic"
    """``generic``: the list below. ``jsonl``: a file with phrases or captions per image. ``names``: the data set's
    names of its objects (COCO's categories, the sandbox's concepts).
    """
    generic: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "object", "thing", "item", "person", "animal", "vehicle", "furniture", "food", "plant", "building",
    )  # fmt: skip
    file: Path | None = None
    """File with one ``{"key": ..., "phrases": [...]}`` or ``{"key": ..., "caption": ...}`` per line."""
    per_image: Positive = 1
    negatives: Fraction = 0.0
    """Share of the text questions about an absent object. Their phrases are those of other images."""
    boxes: Fraction = 0.0
    """Share of the questions with the box of an annotated object instead of text."""
    jitter: Annotated[float, Field(ge=0, lt=0.5)] = 0.05
    """Standard deviation of the box edges, as a share of the box sides."""

    @model_validator(mode="after")
    def _fits_source(self) -> QuestionsConfig:
        if (self.file is not None) != (self.source == "jsonl"):
            raise ValueError("'file' is required with source: jsonl, and not allowed with other sources")
        if self.negatives and self.source == "generic":
            raise ValueError("negatives must be 0 with source: generic: no generic phrase is known to be absent")
        return self
