"""``samdistill predict``: everything in one image that a phrase names or a box shows; or what points and boxes mark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..checkpoints.files import locate
from ..checkpoints.loading import model_kinds
from ..checkpoints.promptable import load_promptable, prompted_alone
from ..dist import default_device
from ..io import as_path
from ..ops.promptable import Promptable
from ..types import UserError
from .concepts import Box, ConceptModel, ask_image, load_concept_model, open_image
from .geometry import check_geometry
from .points import Point, cornered, labelled, segment_image
from .result import Result, picture_file

THRESHOLD = 0.5
"""Least score of a detected instance, unless another is asked for."""
_PROMPTED = ("sam", "sam3_tracker", "samdistill_mobile_sam")
"""Model types that answer points and boxes and no words; a video checkpoint and ``sandbox`` are detectors here."""


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
    image: str | Path | Image.Image | np.ndarray, model: str | Path | ConceptModel | Promptable,
    text: str | None = None, boxes: Sequence[Box] = (), threshold: float | None = None, geometry: str | None = None,
    out: str | Path | None = None, points: Sequence[Point | tuple[float, float]] = (),
) -> Result:  # fmt: skip
    """Ask a model about one image: a detector for every instance of what ``text`` names or ``boxes`` show, a promptable
    model for the object that ``points`` mark, or the one in each of ``boxes``.

    Args:
        image: A file, an opened image, or an array (height, width, 3) of uint8.
        model: A folder, a run, an original file, a hub id or a sandbox name; or an opened model.
        text: A noun phrase, for a detector.
        boxes: (left, top, right, bottom) in pixels of the image; a file's is turned upright first.
        threshold: Least score of an instance, for a detector (0.5).
        geometry: ``square`` or ``longest_side``; None takes the model's own.
        out: A PNG or JPEG to draw into, other than ``image``.
        points: (x, y) or (x, y, label) in pixels; label 1 is on the object, 0 off it.

    Returns:
        Masks, boxes and scores in pixels of the image.

    Raises:
        UserError: Something cannot be asked, read or written.

    Example:
        >>> found = predict("photo.jpg", "runs/words/run", text="red circle")  # doctest: +SKIP
        >>> found.masks.shape  # doctest: +SKIP
    """
    points, boxes = labelled(points), cornered(boxes)
    name = str(as_path(image)) if isinstance(image, str | Path) else ""
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"--threshold: {threshold:g} is not between 0 and 1")
    if geometry is not None:
        check_geometry(geometry)
    place = None if out is None else picture_file(out, name)
    if points and text is not None:
        raise UserError("--text and --point do not go together: a detector reads words, a promptable model points")
    picture = open_image(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
    if points or (text is None and answers_prompts(model)):
        if threshold is not None:
            raise UserError("--threshold goes with a detector; a promptable model gives one mask per object")
        found = _segment(picture, name, model, points, boxes, geometry)
    else:
        if isinstance(model, Promptable):
            raise UserError("a promptable model reads no words: give --point or --box")
        found = _detect(picture, name, model, text, boxes, threshold, geometry)
    if place is not None:
        found.save(place)
    return found


def open_detector(model: str | Path | ConceptModel) -> ConceptModel:
    """The detector, opened on the best device there is."""
    if answers_prompts(model):
        raise UserError(f"{model}: a promptable model reads no words; give a detector")
    return load_concept_model(model, device=default_device()) if isinstance(model, str | Path) else model


def _detect(
    picture: Image.Image, name: str, model: str | Path | ConceptModel, text: str | None, boxes: Sequence[Box],
    threshold: float | None, geometry: str | None,
) -> Result:  # fmt: skip
    asked = load_concept_model(model, device=default_device()) if isinstance(model, str | Path) else model
    least = THRESHOLD if threshold is None else threshold
    found = ask_image(asked, picture, text, boxes, least, geometry).to("cpu")
    return Result(
        picture, name, found.masks, found.boxes, found.scores, text, tuple(boxes), presence=found.presence
    )  # fmt: skip


def _segment(
    picture: Image.Image, name: str, model: str | Path | ConceptModel | Promptable, points: Sequence[Point],
    boxes: Sequence[Box], geometry: str | None,
) -> Result:  # fmt: skip
    asked = load_promptable(model).to(default_device()) if isinstance(model, str | Path) else model
    if not isinstance(asked, Promptable):
        raise UserError("--point: a detector answers words and boxes alone")
    found = segment_image(asked, picture, points, boxes, geometry)
    return Result(picture, name, found.masks, found.boxes, found.scores, None, tuple(boxes), tuple(points))


def answers_prompts(model: str | Path | ConceptModel | Promptable) -> bool:
    """Whether it is a promptable model and no detector, by its ``config.json`` or the names in its file."""
    if not isinstance(model, str | Path):
        return isinstance(model, Promptable)
    place = locate(model)
    if place.is_file():
        return prompted_alone(place)
    return any(name in _PROMPTED for name in model_kinds(place).values())
