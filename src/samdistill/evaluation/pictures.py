"""Pictures of an image with its prompts and every model's masks side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from ..inference.drawing import COLOURS, overlay
from ..inference.prompting import PromptKind, Targets
from ..ops.masks import mask_iou
from .result import Panel, Picture

GROUND_TRUTH = "ground truth"
SIDE = 384  # longer side of a panel in pixels
MOST = 8  # largest number of objects in a picture, because more would cover each other


def picture(
    key: str,
    canvas: UInt8[Tensor, "3 s s"],
    size: tuple[int, int],
    kind: PromptKind,
    targets: Targets,
    found: Mapping[str, Bool[Tensor, "1 n s s"]],
    against: str | None,
) -> Picture:
    """Draw one image with its prompts, its ground truth, and every model's masks.

    Args:
        key: Key of the image.
        canvas: RGB canvas, 0..255.
        size: Height and width of the canvas without padding.
        kind: Kind of the prompts.
        targets: Objects and prompts of this image alone.
        found: Masks on the canvas by model.
        against: Model with whose masks the others are compared. None compares with the masks of ``targets``, which are
            then drawn as ground truth.

    Returns:
        The picture. The longer side of a panel has ``SIDE`` pixels.
    """
    height, width = size
    scale = SIDE / max(height, width)
    shown = Image.fromarray(canvas[:, :height, :width].permute(1, 2, 0).cpu().numpy())
    shown = shown.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    drawn = {GROUND_TRUTH: targets.masks} if against is None else {}
    reference = GROUND_TRUTH if against is None else against
    drawn |= found
    panels = [Panel("image", _with_prompts(np.asarray(shown), kind, targets, scale))]
    for name, masks in drawn.items():
        iou = None if name == reference else float(mask_iou(masks, drawn[reference]).mean())
        panels.append(Panel(name, overlay(np.asarray(shown), masks[0, :, :height, :width]), iou))
    return Picture(key, kind, reference, tuple(panels))


def _with_prompts(image: np.ndarray, kind: PromptKind, targets: Targets, scale: float) -> UInt8[np.ndarray, "h w 3"]:
    """Draw the boxes or each object's first click. Corrective clicks are not drawn, because they differ by model."""
    drawn = Image.fromarray(image.copy())
    pen = ImageDraw.Draw(drawn)
    boxes, points = targets.box.boxes, targets.point.points
    assert boxes is not None and points is not None
    for number, (box, point) in enumerate(zip(boxes[0].tolist(), points[0, :, 0].tolist(), strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        if kind == "box":
            left, top, right, bottom = (v * scale for v in box)
            pen.rectangle((left, top, right, bottom), outline=(255, 255, 255), width=4)
            pen.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=colour, width=2)
        else:
            x, y = ((v + 0.5) * scale for v in point)
            pen.ellipse((x - 7, y - 7, x + 7, y + 7), fill=(255, 255, 255))
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
    return np.asarray(drawn)
