"""Images and prompts on the input of a model, masks back on the image, and drawings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ...ops.pixels import to_rgb
from ...ops.sights import Size, tight_box
from .files import Array, ModelError, one_line

PAD = 128  # value of padded pixels
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")

Box = Sequence[float]


@lru_cache(64)
def _shrinking(size: int, target: int) -> tuple[Array, Array, int]:
    """Return first pixel, integer weights and their bits for resizing with antialiasing, as PyTorch does for uint8."""
    scale = size / target
    reach = max(scale, 1.0)
    most, centres = math.ceil(reach) * 2 + 1, scale * (np.arange(target) + 0.5)
    first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    count = np.clip(np.minimum((centres + reach + 0.5).astype(np.int64), size) - first, 0, most)
    place = np.arange(most)
    away = np.abs((place + first[:, None] - centres[:, None] + 0.5) * (1 / reach))
    weights = np.where((away < 1) & (place < count[:, None]), 1 - away, 0.0)
    weights /= weights.sum(1, keepdims=True)
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return first, np.floor(0.5 + weights * (1 << bits)), bits


def shrink(image: Array, size: Size) -> Array:
    """Resize an image (h, w, 3), uint8, with antialiasing, bit for bit as PyTorch's bilinear kernel for uint8."""
    for axis in (1, 0):
        if image.shape[axis] == size[axis]:
            continue
        turned = image.swapaxes(0, axis)
        first, weights, bits = _shrinking(len(turned), size[axis])
        kind = np.float32 if bits < 16 else np.float64  # holds the integer sums exactly
        values, weights = turned.reshape(len(turned), -1).astype(kind), weights.astype(kind)
        found = np.empty((size[axis], values.shape[1]), kind)
        for row, start in enumerate(first):
            part = values[start : start + weights.shape[1]]
            np.matmul(weights[row, : len(part)], part, out=found[row])
        found = np.clip((found + (1 << (bits - 1))) * 2.0**-bits, 0, 255).astype(np.uint8)
        image = found.reshape(size[axis], *turned.shape[1:]).swapaxes(0, axis)
    return image


def _bilinear(size: int, target: int) -> Array:
    """Return the matrix (target, size) of bilinear interpolation without aligned corners."""
    at = np.maximum((np.arange(target) + 0.5) * (size / target) - 0.5, 0)
    low = np.minimum(at.astype(np.int64), size - 1)
    found = np.zeros((target, size))
    found[np.arange(target), low] += 1 - (at - low)
    found[np.arange(target), np.minimum(low + 1, size - 1)] += at - low
    return found


@lru_cache(64)
def _enlarging(size: int, side: int, placed: int, target: int) -> Array:
    """Return the matrix that resizes ``size`` to ``side`` and then the first ``placed`` of these to ``target``."""
    canvas = _bilinear(size, side)[:placed]
    return (canvas if placed == target else _bilinear(placed, target) @ canvas).astype(np.float32)


@lru_cache(16)
def _averaging(size: int, target: int) -> Array:
    """Return the matrix (target, size) of adaptive average pooling."""
    found = np.zeros((target, size), np.float32)
    for row in range(target):
        start, end = row * size // target, -(-(row + 1) * size // target)
        found[row, start:end] = 1 / (end - start)
    return found


@dataclass(frozen=True)
class Canvas:
    """Placement of images on the square input of a model, and their normalisation in the range 0..1."""

    side: int
    square: bool  # stretch the image; otherwise keep its aspect ratio, and pad it at the bottom and the right
    mean: Array
    std: Array
    zeros: bool = False  # set padding to zero after normalisation

    def placed(self, size: Size) -> Size:
        """Return height and width on the canvas of an image of ``size``."""
        if self.square:
            return self.side, self.side
        scale = self.side / max(size)
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))

    def pixels(self, image: Array) -> Array:
        """Return the normalised input (1, 3, side, side) of an image (h, w, 3), uint8."""
        height, width = self.placed(image.shape[:2])
        canvas = np.full((self.side, self.side, 3), PAD, np.uint8)
        canvas[:height, :width] = shrink(image, (height, width))
        values = (canvas.astype(np.float32) / np.float32(255) - self.mean) / self.std
        if self.zeros:
            values[height:], values[:, width:] = 0, 0
        return np.ascontiguousarray(values.transpose(2, 0, 1))[None]

    def points(self, xy: Array, size: Size) -> Array:
        """Convert x, y in pixels of an image to pixels of the canvas."""
        height, width = self.placed(size)
        return np.asarray(xy, np.float32) * np.array([width / size[1], height / size[0]], np.float32)

    def back(self, logits: Array, size: Size) -> Array:
        """Resize mask logits (a, b) over the canvas to the image."""
        rows, columns = map(_enlarging, logits.shape, (self.side, self.side), self.placed(size), size)
        return rows @ logits.astype(np.float32) @ columns.T

    def cells(self, mask: Array, grid: Size) -> Array:
        """Return the fraction of each cell of a grid over the canvas that a mask of an image covers."""
        height, width = self.placed(mask.shape)
        rows, columns = (
            np.minimum(((np.arange(v, dtype=np.float32) + np.float32(0.5)) * np.float32(s / v)).astype(np.int64), s - 1)
            for v, s in zip((height, width), mask.shape, strict=True)
        )
        placed = np.zeros((self.side, self.side), np.float32)
        placed[:height, :width] = mask.take(rows, 0).take(columns, 1)
        return _averaging(self.side, grid[0]) @ placed @ _averaging(self.side, grid[1]).T


def open_image(image: Any) -> Array:
    """Return an image file (upright by its EXIF orientation), a PIL image or an array as RGB (h, w, 3), uint8."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ModelError(f"an image must be a uint8 array (height, width, 3), got {image.dtype} of {image.shape}")
        return image
    try:
        if isinstance(image, Image.Image):
            return np.asarray(to_rgb(image))
        with Image.open(image) as file:
            file.load()
            ImageOps.exif_transpose(file, in_place=True)
            return np.asarray(to_rgb(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ModelError(f"{image}: not a readable image: {one_line(error)}") from None


def list_frames(folder: Path) -> list[Path]:
    """Return the images of a folder in the natural order of their names (``2.jpg`` before ``10.jpg``)."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder of frames")
    found = [path for path in folder.iterdir() if path.suffix.lower() in _IMAGES and path.name[0] != "."]
    if not found:
        raise ModelError(f"{folder} holds no frame")
    return sorted(found, key=lambda p: [int(s) if n % 2 else s for n, s in enumerate(re.split(r"(\d+)", p.stem))])


def sigmoid(values: Array) -> Array:
    return 1 / (1 + np.exp(-values.astype(np.float32)))


def check_prompts(size: Size, points: Sequence[Sequence[float]], boxes: Sequence[Box]) -> None:
    """Raise ``ModelError`` for points and boxes that are not in an image of ``size``."""
    (height, width), where = size, f"the image, which is {size[1]} x {size[0]} pixels"
    for x, y, label in points:
        if label not in (0, 1):
            raise ModelError(f"point {x:g},{y:g}: the label {label:g} is neither 1 (inside the object) nor 0 (outside)")
        if not (0 <= x < width and 0 <= y < height):
            raise ModelError(f"point {x:g},{y:g} is outside {where}")
    for box in boxes:
        shown = ",".join(f"{value:g}" for value in box)
        if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise ModelError(f"box {shown} is empty; give left,top,right,bottom in pixels")
        if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
            raise ModelError(f"box {shown} reaches beyond {where}")


COLOURS = (
    (230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230),
    (210, 245, 60), (250, 190, 212), (0, 128, 128), (170, 110, 40), (255, 225, 25),
)  # fmt: skip


def draw(image: Array, masks: Mapping[int, Array], labels: Sequence[str]) -> Image.Image:
    """Return an image with masks as tints, and a label at each mask. The key of a mask selects its colour."""
    drawn = image.astype(np.float32) * 0.85
    for number, mask in sorted(masks.items(), key=lambda item: -int(item[1].sum())):
        drawn[mask] = 0.45 * drawn[mask] + 0.55 * np.array(COLOURS[number % len(COLOURS)], np.float32)
    found = Image.fromarray(drawn.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(found)
    for mask, label in zip(masks.values(), labels, strict=True):
        left, top, _, _ = tight_box(mask)
        pen.text((left, max(0, top - 11)), label, fill="white", stroke_width=1, stroke_fill="black")
    return found


def runs(mask: Array) -> dict[str, list[int]]:
    """Return a mask in COCO's uncompressed run-length encoding: lengths of runs in column order, background first."""
    flat = np.concatenate([[False], mask.T.ravel(), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts[: len(counts) - (counts[-1] == 0)].tolist()}
