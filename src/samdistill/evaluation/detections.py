"""Detected instances drawn over an image: masks, boxes and a label at each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .pictures import COLOURS, overlay


def draw_instances(
    image: UInt8[np.ndarray, "h w 3"],
    masks: Bool[Tensor, "n a b"],
    boxes: Float[Tensor, "n 4"],
    labels: Sequence[str],
) -> UInt8[np.ndarray, "h w 3"]:
    """A copy of ``image`` with every instance in its own colour; the first, the best one, is drawn last, on top.

    masks: of any resolution. boxes: xyxy in pixels of ``image``. labels: one per instance, such as its score, or "";
    they and the lines grow with the image.
    """
    drawn = Image.fromarray(overlay(image, masks))
    pen = ImageDraw.Draw(drawn)
    side = min(image.shape[:2])
    line, font = max(1, round(side / 300)), ImageFont.load_default(max(11, round(side / 36)))
    for number in reversed(range(len(boxes))):
        colour = COLOURS[number % len(COLOURS)]
        left, top, right, bottom = boxes[number].tolist()
        # pixel i spans i..i+1, so the last column inside is right - 1
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
        if labels[number]:
            _label(pen, labels[number], (left, top), colour, font)
    return np.asarray(drawn)


def _label(
    pen: ImageDraw.ImageDraw, text: str, corner: tuple[float, float], colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:  # fmt: skip
    """Text on a plate of ``colour`` that stands on ``corner``, moved inside the picture where it would be cut off."""
    x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
    width, height = x1 - x0 + 6, y1 - y0 + 6
    left, top = max(0, min(corner[0], pen.im.size[0] - width)), max(0, corner[1] - height)
    pen.rectangle((left, top, left + width - 1, top + height - 1), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    pen.text((left + 3 - x0, top + 3 - y0), text, fill="black" if bright else "white", font=font)
