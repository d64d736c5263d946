"""Prediction on images, with a detector (phrases, example boxes) or a promptable model (points, boxes)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.exported import PROMPTABLE, exported_kind
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
"""Default number of images in one forward pass."""
THRESHOLD = 0.5
"""Default minimum score of a detected instance."""
_PROMPTED = ("sam", "sam3_tracker", "samdistill_mobile_sam", "samdistill_sam", "sam2", "sam2_video",
             "sam3_tracker_video")  # fmt: skip
"""Model types that take points and boxes and no text. A SAM 3 video checkpoint and ``sandbox`` count as detectors."""


def parse_box(text: str) -> Box:
    """Parse ``left,top,right,bottom``. Raises ``UserError`` for anything but four numbers."""
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box: {text!r} is not left,top,right,bottom in pixels, such as 10,20,110,90") from None
    return left, top, right, bottom


def parse_point(text: str) -> Point:
    """Parse ``x,y`` or ``x,y,label``. Raises ``UserError`` for anything but two numbers and a label of 0 or 1."""
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
    """Run a detector or a promptable model on one image.

    A detector returns every instance of the concept that ``text`` names or ``boxes`` give examples of. A promptable
    model returns the object marked by ``points``, or one object per box in ``boxes``.

    Args:
        image: An image file, a PIL image, or an RGB array (height, width, 3) of dtype uint8.
        model: A model folder, a run folder, an original checkpoint file, a hub id or a sandbox name; or an opened
            model.
        text: A noun phrase. Only for a detector.
        boxes: Boxes (left, top, right, bottom) in pixels. A file is first rotated upright according to its EXIF
            orientation.
        threshold: Minimum score of an instance, in 0..1. Only for a detector; None means 0.5.
        geometry: How the image is fitted to the model's canvas: ``square`` (stretched) or ``longest_side`` (aspect
            kept, padded). None uses the geometry saved with the model.
        out: PNG or JPEG file for the image with the masks drawn on it. Must not be ``image``.
        points: Points (x, y) or (x, y, label) in pixels. Label 1 (the default) is inside the object, 0 outside.

    Returns:
        Masks, boxes and scores in pixels of the image. They are on the CPU.

    Raises:
        UserError: The prompts do not fit the model or the image, the image or the model cannot be read, or ``out``
            cannot be written.

    Example:
        >>> import numpy as np
        >>> image = np.zeros((126, 126, 3), np.uint8)
        >>> predict(image, "sandbox-mobile", points=[(60, 60)]).masks.shape
        torch.Size([1, 126, 126])
    """
    asked = Asked.of((text,), boxes, points, threshold)
    if geometry is not None:
        check_geometry(geometry)
    name = str(as_path(image)) if isinstance(image, str | Path) else ""
    place = None if out is None else picture_file(out, name)
    picture = open_image(image)  # before the model is loaded, so that an unreadable image is refused at once
    opened = asked.open(model)
    ((found,),) = asked.answer(opened, [lay(picture, canvas_of(opened, geometry), name)])
    if place is not None:
        found.save(place)
    return found


@dataclass(frozen=True)
class Asked:
    """Prompts that are applied to every image.

    Attributes:
        texts: Phrases for a detector. ``(None,)`` if there are only boxes or points.
        boxes: Boxes (left, top, right, bottom) in pixels.
        points: Points (x, y, label) in pixels.
        threshold: Minimum score of an instance; None means ``THRESHOLD``.
    """

    texts: tuple[str | None, ...]
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    threshold: float | None = None

    @classmethod
    def of(
        cls, texts: Sequence[str | None], boxes: Sequence[Box] = (),
        points: Sequence[Point | tuple[float, float]] = (), threshold: float | None = None,
    ) -> Asked:  # fmt: skip
        """Build prompts and check what can be checked without an image or a model.

        Raises:
            UserError: A box or point has the wrong form, the threshold is out of range, or text and points are
                combined.
        """
        found = cls(tuple(texts), cornered(boxes), labelled(points), threshold)
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"--threshold: {threshold:g} is not between 0 and 1")
        if found.points and found.worded:
            raise UserError(
                "--text and --point cannot be combined: a detector takes text, a promptable model takes points"
            )
        return found

    @property
    def worded(self) -> bool:
        return self.texts != (None,)

    def open(self, model: str | Path | ConceptModel | Promptable) -> ConceptModel | Promptable:
        """Load ``model`` onto the default device, or take an opened one as it is.

        Raises:
            UserError: The model cannot be read, or does not accept these prompts.
        """
        if self.points or (not self.worded and answers_prompts(model)):
            if self.threshold is not None:
                raise UserError("--threshold is for detectors only; a promptable model gives one mask per object")
            asked = load_promptable(model).to(default_device()) if isinstance(model, str | Path) else model
            if not isinstance(asked, Promptable):
                raise UserError("--point: a detector takes --text and --box only")
            return asked
        if isinstance(model, Promptable):
            raise UserError("--text: a promptable model takes no text; give --point or --box")
        detector = load_concept_model(model, device=default_device()) if isinstance(model, str | Path) else model
        for text in self.texts:
            warn_unknown(detector.words, text or "")
        return detector

    def answer(self, model: ConceptModel | Promptable, pictures: Sequence[Laid]) -> list[list[Result]]:
        """Run ``model`` (as returned by ``open``) on ``pictures``. Returns, for each picture, one result per text."""
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
    """Apply the same prompts to many images in batches. Threads decode the next batches in the meantime.

    Args:
        images: Files, PIL images or arrays.
        model: The model as returned by ``asked.open``.
        asked: The prompts.
        geometry: ``square`` or ``longest_side``; None uses the model's own.
        batch_size: Images in one forward pass.
        bar: Progress bar that is advanced by the number of images.

    Yields:
        For each batch: a list per readable image with one result per text, and the files that could not be read.

    Raises:
        UserError: ``batch_size`` is less than 1, the prompts do not fit an image, or a file does not exist.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}")
    for pictures, unreadable in batches(images, canvas_of(model, geometry), batch_size):
        yield asked.answer(model, pictures) if pictures else [], unreadable
        if bar is not None:
            bar.advance(len(pictures) + len(unreadable))


def answers_prompts(model: str | Path | ConceptModel | Promptable) -> bool:
    """Whether ``model`` is a promptable model and not a detector.

    Decided by the model type in its ``config.json``, the kind in its ``export.json``, or the tensor names of a file.
    """
    if not isinstance(model, str | Path):
        return isinstance(model, Promptable)
    place = locate(model)
    if place.is_file():
        return prompted_alone(place)
    if (kind := exported_kind(place)) is not None:
        return kind == PROMPTABLE
    return any(name in _PROMPTED for name in model_kinds(place).values())
