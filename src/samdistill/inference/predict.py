"""``samdistill predict``: everything in one image that a phrase names or a box shows; or what points and boxes mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from ..checkpoints.files import locate
from ..checkpoints.loading import model_kinds
from ..checkpoints.promptable import load_promptable, prompted_alone
from ..data.saco import to_rle
from ..dist import default_device
from ..io import as_path, check_output, write_bytes
from ..ops.images import encoded
from ..ops.promptable import Promptable
from ..types import UserError
from .concepts import Box, ConceptModel, Detected, ask_image, load_concept_model, open_image
from .drawing import draw_instances
from .points import Point, Segmented, cornered, labelled, segment_image

PICTURES: dict[str, Literal["PNG", "JPEG"]] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
THRESHOLD = 0.5
"""Least score of a detected instance, unless another is asked for."""
_PROMPTED = ("sam", "sam3_tracker", "samdistill_mobile_sam")
"""Model types that answer points and boxes and no words; a video checkpoint and ``sandbox`` are detectors here."""


@dataclass(frozen=True)
class Prediction:
    """What was asked of an image and what was found in it, best first. name: of its file, or empty."""

    name: str
    image: Image.Image
    text: str | None
    boxes: tuple[Box, ...]
    detected: Detected

    def to_dict(self) -> dict[str, Any]:
        """Plain values: boxes as xyxy in pixels, masks as COCO's compressed run lengths."""
        found = self.detected
        return {
            "image": self.name, "text": self.text, "boxes": [list(box) for box in self.boxes],
            "instances": as_json(found.scores, found.boxes, found.masks), "presence": found.presence,
        }  # fmt: skip

    def draw(self) -> Image.Image:
        """The image with masks, boxes and scores, at its own resolution."""
        return drawn(self.image, self.detected.scores, self.detected.boxes, self.detected.masks)


@dataclass(frozen=True)
class PromptedPrediction:
    """Which points or boxes were shown to a promptable model, and its mask of each object. name: as above."""

    name: str
    image: Image.Image
    points: tuple[Point, ...]
    boxes: tuple[Box, ...]
    segmented: Segmented

    def to_dict(self) -> dict[str, Any]:
        """Plain values: points as x, y, label; boxes as xyxy in pixels; masks as COCO's compressed run lengths."""
        found = self.segmented
        return {
            "image": self.name, "points": [list(point) for point in self.points],
            "boxes": [list(box) for box in self.boxes], "instances": as_json(found.scores, found.boxes, found.masks),
        }  # fmt: skip

    def draw(self) -> Image.Image:
        """The image with masks, the boxes around them and scores, at its own resolution."""
        return drawn(self.image, self.segmented.scores, self.segmented.boxes, self.segmented.masks)


def as_json(scores: Tensor, boxes: Tensor, masks: Tensor) -> list[dict[str, Any]]:
    """An object per mask: score, box, area in pixels and COCO's compressed run lengths."""
    return [
        {"score": score, "box": box, "area": int(mask.sum()), "segmentation": to_rle(mask.numpy())}
        for score, box, mask in zip(scores.tolist(), boxes.tolist(), masks, strict=True)
    ]


def drawn(image: Image.Image, scores: Tensor, boxes: Tensor, masks: Tensor) -> Image.Image:
    labels = [f"{score:.2f}" for score in scores.tolist()]
    return Image.fromarray(draw_instances(np.asarray(image), masks, boxes, labels))


def parse_box(text: str) -> Box:
    """``left,top,right,bottom``. Raises ``UserError`` for anything but four numbers."""
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box: {text!r} is not left,top,right,bottom in pixels, such as 10,20,110,90") from None
    return left, top, right, bottom


def parse_point(text: str) -> Point:
    """``x,y`` or ``x,y,label``. Raises ``UserError`` for anything but two numbers and 0 or 1."""
    x, y, *rest = [*text.split(","), ""][:3] if text.count(",") <= 2 else ("", "", "")
    try:
        point = float(x), float(y), int(rest[0] or 1)
    except ValueError:
        point = 0.0, 0.0, -1
    if point[2] not in (0, 1):
        raise UserError(
            f"--point: {text!r} is not x,y in pixels, or x,y,label with 1 inside and 0 outside the object, such as "
            "320,240 or 10,20,0"
        )
    return point


def predict(
    image: str | Path | Image.Image, model: str | Path | ConceptModel | Promptable, text: str | None = None,
    boxes: Sequence[Box] = (), threshold: float | None = None, geometry: str | None = None,
    out: str | Path | None = None, points: Sequence[Point | tuple[float, float]] = (),
) -> Prediction | PromptedPrediction:  # fmt: skip
    """Ask a detector for every instance of what ``text`` names, of what ``boxes`` show, or of both together; or a
    promptable model for the mask of the object that ``points`` mark, or of the one in each of ``boxes``.

    image: a file, or an opened one. model: what ``load_concept_model`` or ``load_promptable`` takes, or what it
    returned. boxes: x0, y0, x1, y1. points: x, y and a label, 1 (left out: 1) on the object or 0 off it; both in pixels
    of the image, a file's turned upright. threshold: least score of an instance (0.5). geometry: square or
    longest_side; None is square for a detector and the model's own way for a promptable one. out: a PNG or JPEG to draw
    into, other than ``image``. Raises ``UserError`` for what cannot be asked, read or written.
    """
    points, boxes = labelled(points), cornered(boxes)
    image = image if isinstance(image, Image.Image) else as_path(image)
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"--threshold: {threshold:g} is not between 0 and 1")
    if geometry not in (None, "square", "longest_side"):
        raise UserError(f"no geometry is called {geometry!r}; there is: longest_side, square")
    place = None if out is None else _picture_file(out, image)
    if points and text is not None:
        raise UserError("--text and --point do not go together: a detector reads words, a promptable model points")
    picture = open_image(image)
    name = "" if isinstance(image, Image.Image) else str(image)
    found: Prediction | PromptedPrediction
    if points or (text is None and _answers_prompts(model)):
        if threshold is not None:
            raise UserError("--threshold goes with a detector; a promptable model gives one mask per object")
        found = _segment(picture, name, model, points, boxes, geometry)
    else:
        if isinstance(model, Promptable):
            raise UserError("a promptable model reads no words: give --point or --box")
        found = _detect(picture, name, model, text, boxes, threshold, geometry)
    if place is not None:
        write_bytes(place, encoded(found.draw(), PICTURES[place.suffix.lower()]))
    return found


def _picture_file(out: str | Path, image: Path | Image.Image) -> Path:
    place, (*others, last) = as_path(out), PICTURES
    if place.suffix.lower() not in PICTURES:
        raise UserError(f"--out: {place} does not end in {', '.join(others)} or {last}")
    check_output(place, *([] if isinstance(image, Image.Image) else [image]))
    return place


def _detect(
    picture: Image.Image, name: str, model: str | Path | ConceptModel, text: str | None, boxes: Sequence[Box],
    threshold: float | None, geometry: str | None,
) -> Prediction:  # fmt: skip
    asked = load_concept_model(model, device=default_device()) if isinstance(model, str | Path) else model
    least = THRESHOLD if threshold is None else threshold
    found = ask_image(asked, picture, text, boxes, least, geometry or "square").to("cpu")
    return Prediction(name, picture, text, tuple(boxes), found)


def _segment(
    picture: Image.Image, name: str, model: str | Path | ConceptModel | Promptable, points: Sequence[Point],
    boxes: Sequence[Box], geometry: str | None,
) -> PromptedPrediction:  # fmt: skip
    asked = load_promptable(model).to(default_device()) if isinstance(model, str | Path) else model
    if not isinstance(asked, Promptable):
        raise UserError("--point: a detector answers words and boxes alone")
    found = segment_image(asked, picture, points, boxes, geometry)
    return PromptedPrediction(name, picture, tuple(points), tuple(boxes), found)


def _answers_prompts(model: str | Path | ConceptModel | Promptable) -> bool:
    """Whether it is a promptable model and no detector, by its ``config.json`` or the names in its file."""
    if not isinstance(model, str | Path):
        return isinstance(model, Promptable)
    place = locate(model)
    if place.is_file():
        return prompted_alone(place)
    return any(name in _PROMPTED for name in model_kinds(place).values())
