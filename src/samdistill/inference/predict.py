"""``samdistill predict``: everything in an image that a phrase names or a box shows; or what points and boxes mark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.files import locate
from ..checkpoints.loading import model_kinds
from ..checkpoints.promptable import load_promptable, prompted_alone
from ..data.skipped import BadInput
from ..dist import default_device
from ..io import as_path
from ..ops.promptable import Promptable
from ..progress import Progress
from ..types import UserError
from .concepts import Box, ConceptModel, ask_images, load_concept_model, warn_unknown
from .geometry import canvas_of, check_geometry
from .pictures import Laid, Picture, batches, lay, open_image
from .points import Point, cornered, labelled, segment_images
from .result import Result, picture_file

BATCH = 8
"""Images in one call of a model."""
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
    image: Picture, model: str | Path | ConceptModel | Promptable,
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
    asked = Asked.of((text,), boxes, points, threshold)
    if geometry is not None:
        check_geometry(geometry)
    name = str(as_path(image)) if isinstance(image, str | Path) else ""
    place = None if out is None else picture_file(out, name)
    picture = open_image(image)  # before the model: an image is refused sooner
    opened = asked.open(model)
    ((found,),) = asked.answer(opened, [lay(picture, canvas_of(opened, geometry), name)])
    if place is not None:
        found.save(place)
    return found


@dataclass(frozen=True)
class Asked:
    """What is asked of every image. texts: phrases for a detector; (None,) where boxes or points are all there is."""

    texts: tuple[str | None, ...]
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    threshold: float | None = None

    @classmethod
    def of(
        cls, texts: Sequence[str | None], boxes: Sequence[Box] = (),
        points: Sequence[Point | tuple[float, float]] = (), threshold: float | None = None,
    ) -> Asked:  # fmt: skip
        """Checked, as far as no image is needed. Raises ``UserError``."""
        found = cls(tuple(texts), cornered(boxes), labelled(points), threshold)
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"--threshold: {threshold:g} is not between 0 and 1")
        if found.points and found.worded:
            raise UserError("--text and --point do not go together: a detector reads words, a promptable model points")
        return found

    @property
    def worded(self) -> bool:
        return self.texts != (None,)

    def open(self, model: str | Path | ConceptModel | Promptable) -> ConceptModel | Promptable:
        """The model on the best device there is, if it is one that can be asked so. Raises ``UserError``."""
        if self.points or (not self.worded and answers_prompts(model)):
            if self.threshold is not None:
                raise UserError("--threshold goes with a detector; a promptable model gives one mask per object")
            asked = load_promptable(model).to(default_device()) if isinstance(model, str | Path) else model
            if not isinstance(asked, Promptable):
                raise UserError("--point: a detector answers words and boxes alone")
            return asked
        if isinstance(model, Promptable):
            raise UserError("a promptable model reads no words: give --point or --box")
        detector = load_concept_model(model, device=default_device()) if isinstance(model, str | Path) else model
        for text in self.texts:
            warn_unknown(detector.words, text or "")
        return detector

    def answer(self, model: ConceptModel | Promptable, pictures: Sequence[Laid]) -> list[list[Result]]:
        """For every picture a result per text. model: as ``open`` gave it."""
        if isinstance(model, Promptable):
            segmented = segment_images(model, pictures, self.points, self.boxes)
            return [
                [Result(picture.image, picture.name, own.masks, own.boxes, own.scores, None, self.boxes, self.points)]
                for picture, own in zip(pictures, segmented, strict=True)
            ]
        least = THRESHOLD if self.threshold is None else self.threshold
        found = ask_images(model, pictures, self.texts, self.boxes, least)
        return [
            [
                Result(picture.image, picture.name, one.masks, one.boxes, one.scores, text, self.boxes,
                       presence=one.presence)
                for text, one in zip(self.texts, own, strict=True)
            ]
            for picture, own in zip(pictures, found, strict=True)
        ]  # fmt: skip


def predict_images(
    images: Sequence[Picture], model: ConceptModel | Promptable, asked: Asked, *, geometry: str | None = None,
    batch_size: int = BATCH, bar: Progress | None = None,
) -> Iterator[tuple[list[list[Result]], list[BadInput]]]:  # fmt: skip
    """Ask a model the same about many images, a batch at a time, while threads decode the next ones.

    model: as ``asked.open`` gave it. Yields for each batch a list per image with a result per text, and the files of it
    that cannot be read. Raises ``UserError`` for what cannot be asked and for a file that is not there.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size: {batch_size} is less than 1")
    for pictures, unreadable in batches(images, canvas_of(model, geometry), batch_size):
        yield asked.answer(model, pictures) if pictures else [], unreadable
        if bar is not None:
            bar.advance(len(pictures) + len(unreadable))


def answers_prompts(model: str | Path | ConceptModel | Promptable) -> bool:
    """Whether it is a promptable model and no detector, by its ``config.json`` or the names in its file."""
    if not isinstance(model, str | Path):
        return isinstance(model, Promptable)
    place = locate(model)
    if place.is_file():
        return prompted_alone(place)
    return any(name in _PROMPTED for name in model_kinds(place).values())
