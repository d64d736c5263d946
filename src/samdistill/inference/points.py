"""Segmentation with a promptable model: points on one object, or a box around each of several objects, to masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..data.prompts import check_prompts
from ..ops.masks import masks_to_boxes
from ..ops.promptable import Promptable, embed, predict
from ..types import Prompts, UserError
from .concepts import Box
from .geometry import canvas_of
from .pictures import Laid, image_batch, lay

Point = tuple[float, float, int]
"""x and y in pixels of the image file, and the label: 1 inside the object, 0 outside."""


@dataclass(frozen=True)
class Segmented:
    """One mask per prompted object, in the order of the prompts.

    Attributes:
        masks: Masks at the size of the image file, (n, h, w).
        boxes: Boxes around the masks, (n, 4), xyxy in pixels; zeros for an empty mask.
        scores: IoU of each mask as predicted by the model, (n,).
    """

    masks: Bool[Tensor, "n h w"]
    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.scores)


def labelled(points: Iterable[Sequence[float]]) -> tuple[Point, ...]:
    """Add label 1 (inside the object) to points without a label. Raises ``UserError`` for anything but points."""
    found = []
    for point in points:
        try:
            x, y, label = [*point, 1] if len(point) == 2 else point
            found.append((float(x), float(y), int(label)))
        except (TypeError, ValueError):
            raise UserError(f"points: {point!r} is not (x, y) or (x, y, label); give a list of those") from None
    return tuple(found)


def cornered(boxes: Iterable[Sequence[float]]) -> tuple[Box, ...]:
    """Convert boxes to tuples of four floats. Raises ``UserError`` for anything but boxes."""
    found = []
    for box in boxes:
        try:
            left, top, right, bottom = (float(value) for value in box)
        except (TypeError, ValueError):
            raise UserError(f"boxes: {box!r} is not (left, top, right, bottom); give a list of those") from None
        found.append((left, top, right, bottom))
    return tuple(found)


def segment_image(
    model: Promptable, image: str | Path | Image.Image, points: Sequence[Point | tuple[float, float]] = (),
    boxes: Sequence[Box] = (), geometry: str | None = None,
) -> Segmented:  # fmt: skip
    """Segment the object marked by ``points`` (with at most one box around it), or the object in each of ``boxes``.

    A single point inside is ambiguous: the model predicts three masks, and the one with the highest score is returned.

    Args:
        model: The promptable model.
        image: An image file or a PIL image.
        points: Points (x, y) or (x, y, label). Coordinates are pixel indices as shown by image viewers: an integer is
            the centre of a pixel. Label 1 (the default) is inside the object, 0 outside.
        boxes: Boxes xyxy in continuous pixel coordinates: pixel i covers i to i + 1.
        geometry: ``square`` or ``longest_side``; None uses the model's own.

    Raises:
        UserError: The image cannot be read, or the prompts are outside it or cannot be combined.
    """
    return segment_images(model, [lay(image, canvas_of(model, geometry))], points, boxes)[0]


@torch.no_grad()
def segment_images(
    model: Promptable, pictures: Sequence[Laid], points: Sequence[Point | tuple[float, float]] = (),
    boxes: Sequence[Box] = (),
) -> list[Segmented]:  # fmt: skip
    """Apply ``segment_image`` to several pictures, which are encoded in one batch.

    The same prompts are used for every picture, in pixels of each.
    """
    points, boxes = labelled(points), cornered(boxes)
    if not points and not boxes:
        raise UserError("no prompt given: give --point or --box")
    if points and len(boxes) > 1:
        raise UserError(f"--point: with {len(boxes)} boxes it is unclear whose points they are; give one box at most")
    if strange := [point for point in points if point[2] not in (0, 1)]:
        raise UserError(f"--point: label {strange[0][2]} is neither 1 (inside the object) nor 0 (outside)")
    asked = [_on_canvas(points, boxes, picture) for picture in pictures]
    device = next(model.parameters()).device
    ambiguous = len(points) == 1 and not boxes and points[0][2] == 1
    embeddings, found = embed(model, image_batch(pictures).to(device)), list[Segmented]()
    for number, (picture, prompts) in enumerate(zip(pictures, asked, strict=True)):
        prediction = predict(model, embeddings.one_image(number), prompts.to(device), ambiguous)
        logits, scores = (values[0].float().cpu() for values in prediction.best())
        masks = torch.stack([_in_file(one, picture) for one in logits])
        found.append(Segmented(masks, masks_to_boxes(masks), scores))
    return found


def _on_canvas(points: Sequence[Point], boxes: Sequence[Box], picture: Laid) -> Prompts:
    """Convert prompts to canvas coordinates: one object with its points, or one object per box.

    Raises ``UserError`` for prompts outside the image. The message has the coordinates in pixels of the file.
    """
    place, original = picture.place, picture.original
    count = max(1, len(boxes))
    xy = torch.tensor([point[:2] for point in points], dtype=torch.float32).view(1, 1, -1, 2) if points else None
    labels = torch.tensor([[[point[2] for point in points]]]) if points else None
    corners = torch.tensor(boxes, dtype=torch.float32).view(1, -1, 4) if boxes else None
    given = Prompts(torch.ones(1, count, dtype=torch.bool), xy, labels, corners)
    check_prompts(given, torch.tensor([original]))
    if xy is not None:
        xy = place.points(xy + 0.5, original) - 0.5  # pixel indices to continuous coordinates and back
    if corners is not None:
        corners = place.points(corners.view(1, -1, 2, 2), original).view(1, -1, 4)
    return Prompts(given.valid, xy, labels, corners)


def _in_file(logits: Float[Tensor, "h w"], picture: Laid) -> Bool[Tensor, "H W"]:
    """Resize one mask to the image file. Called for one mask at a time, as float maps of all need too much memory."""
    side = (picture.place.image_size, picture.place.image_size)
    canvas = F.interpolate(logits[None, None], side, mode="bilinear", align_corners=False)[0]
    return picture.place.masks_back(canvas, picture.original)[0] > 0
