"""Drawing of instances over an image: masks, boxes and labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F


def draw_instances(
    image: UInt8[np.ndarray, "h w 3"],
    masks: Bool[Tensor, "n a b"],
    boxes: Float[Tensor, "n 4"],
    labels: Sequence[str],
) -> UInt8[np.ndarray, "h w 3"]:
    """Return a copy of ``image`` with masks, boxes and labels, each instance in its own colour.

    Boxes and labels are drawn in reverse order, so that those of the first instance are on top. The sizes of text and
    lines are proportional to the image.

    Args:
        image: RGB image.
        masks: Masks of the instances, at any resolution.
        boxes: Boxes, xyxy in pixels of ``image``.
        labels: One text per instance, such as its score; "" for none.
    """
    drawn = Image.fromarray(overlay(image, masks))
    pen = ImageDraw.Draw(drawn)
    side = min(image.shape[:2])
    line, font = max(1, round(side / 300)), ImageFont.load_default(max(11, round(side / 36)))
    for number in reversed(range(len(boxes))):
        colour = COLOURS[number % len(COLOURS)]
        left, top, right, bottom = boxes[number].tolist()
        # pixel i covers i..i+1, so the last column inside the box is right - 1
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
        if labels[number]:
            _label(pen, labels[number], (left, top), colour, font)
    return np.asarray(drawn)


def _label(
    pen: ImageDraw.ImageDraw, text: str, corner: tuple[float, float], colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:  # fmt: skip
    """Draw text on a filled rectangle above ``corner``, moved where it would be outside the picture."""
    x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
    width, height = x1 - x0 + 6, y1 - y0 + 6
    left, top = max(0, min(corner[0], pen.im.size[0] - width)), max(0, corner[1] - height)
    pen.rectangle((left, top, left + width - 1, top + height - 1), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    pen.text((left + 3 - x0, top + 3 - y0), text, fill="black" if bright else "white", font=font)


COLOURS = (
    (230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230),
    (210, 245, 60), (250, 190, 212), (0, 128, 128), (170, 110, 40), (255, 225, 25),
)  # fmt: skip


def overlay(image: UInt8[np.ndarray, "h w 3"], masks: Bool[Tensor, "n a b"]) -> UInt8[np.ndarray, "h w 3"]:
    """Draw masks of any resolution over ``image``, each as a tint and an outline in its own colour."""
    height, width = image.shape[:2]
    result = image.astype(np.float32) * 0.85
    for number in masks.flatten(1).sum(1).argsort(descending=True).tolist():  # small masks last, so they stay visible
        # bilinear interpolation before the threshold gives smooth edges, as in the models' own masks
        one = masks[number][None, None].float().cpu()
        mask = F.interpolate(one, (height, width), mode="bilinear", align_corners=False)[0, 0] > 0.5
        colour = np.array(COLOURS[number % len(COLOURS)], np.float32)
        inside = mask.numpy()
        result[inside] = 0.45 * result[inside] + 0.55 * colour
        result[_outline(mask)] = 0.25 * 255 + 0.75 * colour
    return result.clip(0, 255).astype(np.uint8)


def _outline(mask: Bool[Tensor, "h w"]) -> np.ndarray:
    """Return the pixels of a mask within two pixels of its edge. The border of the image does not count as an edge."""
    outside = (~mask)[None, None].float()
    return (mask & (F.max_pool2d(outside, 5, stride=1, padding=2)[0, 0] > 0)).numpy()
