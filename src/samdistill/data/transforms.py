"""Place decoded images on a model's canvas, with seeded, reproducible augmentation."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..config import AugmentConfig
from ..ops.masks import masks_to_boxes
from ..ops.sights import Size
from ..types import UserError

PAD = 128
"""Value of padded pixels: mid-grey, close to zero after SAM 3's normalisation, as SAM pads after normalising."""
_REVISION = 1  # part of every fingerprint; increase it if a change to this module changes pixels
_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


@dataclass(frozen=True)
class Geometry:
    """Placement of an image on a square canvas.

    Coordinates are continuous: pixel i covers the interval from i to i + 1.

    Args:
        image_size: Side of the canvas in pixels.
        kind: ``square`` resizes to the whole canvas without keeping the aspect ratio, as in SAM 3's training.
            ``longest_side`` keeps the aspect ratio and pads at the bottom and the right, as in SAM's training.

    Raises:
        UserError: The kind is unknown or the size is below 1.

    Example:
        >>> Geometry(1024, "longest_side").placed((480, 640))
        (768, 1024)
    """

    image_size: int
    kind: Literal["square", "longest_side"] = "square"

    def __post_init__(self) -> None:
        if self.kind not in ("square", "longest_side"):
            raise UserError(f"geometry must be square or longest_side, got {self.kind!r}")
        if self.image_size < 1:
            raise UserError(f"image_size must be at least 1, got {self.image_size}")

    def placed(self, size: Size) -> Size:
        """Return height and width on the canvas of an image of ``size``. Its top left corner is that of the canvas."""
        if self.kind == "square":
            return self.image_size, self.image_size
        scale = self.image_size / max(size)
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))

    def canvas(self, image: Image.Image) -> tuple[UInt8[Tensor, "3 s s"], Size]:
        """Resize and pad an RGB image.

        Resizing is bilinear with antialiasing. PyTorch's fixed-point kernel gives values within 2 grey levels of
        Pillow's and torchvision's, in a third of Pillow's time.

        Args:
            image: The image.

        Returns:
            Canvas, uint8, of shape (3, s, s), padded with ``PAD``, and height and width of the part that is not
            padding.
        """
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        valid = self.placed((image.height, image.width))
        if pixels.shape[-2:] != valid:
            pixels = F.interpolate(pixels, valid, mode="bilinear", antialias=True, align_corners=False)
        if valid == (self.image_size, self.image_size):
            return pixels[0].contiguous(), valid
        canvas = torch.full((3, self.image_size, self.image_size), PAD, dtype=torch.uint8)
        canvas[:, : valid[0], : valid[1]] = pixels[0]
        return canvas, valid

    def mask(self, mask: Bool[np.ndarray | Tensor, "*n h w"]) -> Bool[Tensor, "*n s s"]:
        """Place masks in image pixels on the canvas.

        Each canvas pixel takes the value of the image pixel under its centre. Padding is False.
        """
        source = np.asarray(mask)
        size = (source.shape[-2], source.shape[-1])
        valid = self.placed(size)
        rows, columns = (((torch.arange(v) + 0.5) * (s / v)).long().clamp(max=s - 1).numpy()
                         for v, s in zip(valid, size, strict=True))  # fmt: skip
        placed = np.zeros((*source.shape[:-2], self.image_size, self.image_size), bool)
        # selecting rows and then columns in NumPy takes a tenth of the time of PyTorch's indexing with both
        placed[..., : valid[0], : valid[1]] = source.take(rows, -2).take(columns, -1)
        return torch.from_numpy(placed)

    def coverage(self, masks: Bool[np.ndarray, "n h w"], side: int) -> UInt8[Tensor, "n side side"]:
        """Return the share of each cell of a grid over the canvas that masks in image pixels cover.

        A pixel counts for the cell under its centre. No map of the size of the canvas is made.

        Args:
            masks: Masks of shape (n, h, w).
            side: Cells of the grid in each direction.

        Returns:
            Shares as 0..255. Padding is 0.
        """
        size = masks.shape[-2:]
        height, width = (s * self.image_size / v for s, v in zip(size, self.placed(size), strict=True))  # of the canvas
        padded = np.zeros((math.ceil(height), math.ceil(width)), np.uint8)
        found = np.empty((len(masks), side, side), np.uint8)
        for row, mask in zip(found, masks, strict=True):
            padded[: size[0], : size[1]] = mask * np.uint8(255)
            whole = Image.fromarray(padded)
            row[:] = whole.resize((side, side), Image.Resampling.BOX, box=(0, 0, width, height))
        return torch.from_numpy(found)

    def points(self, xy: Float[Tensor, "*n 2"], original_size: Size) -> Float[Tensor, "*n 2"]:
        """Convert x, y in image pixels to canvas pixels.

        Convert boxes with ``points(boxes.view(..., 2, 2), size).view(..., 4)``.
        """
        height, width = self.placed(original_size)
        scale = [width / original_size[1], height / original_size[0]]
        return torch.as_tensor(xy, dtype=torch.float32) * torch.tensor(scale)

    def masks_back(self, logits: Float[Tensor, "*n s s"], original_size: Size) -> Float[Tensor, "*n h w"]:
        """Convert logits on the canvas to logits at image resolution: remove the padding and resize bilinearly.

        Args:
            logits: Logits at the size of the canvas.
            original_size: Height and width of the image.

        Returns:
            Float32 logits of shape (..., h, w).

        Raises:
            ValueError: The logits do not have the size of the canvas.
        """
        side = self.image_size
        if logits.shape[-2:] != (side, side):
            raise ValueError(f"masks of {tuple(logits.shape[-2:])} are not on the {side} x {side} canvas")
        height, width = self.placed(original_size)
        valid = logits[..., :height, :width].reshape(-1, 1, height, width).float()
        back = F.interpolate(valid, original_size, mode="bilinear", align_corners=False)
        return back.view(*logits.shape[:-2], *original_size)


def view_seed(seed: int, key: str, view: int) -> int:
    """Return the 31-bit seed of a view of an image. It is the same on every platform."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{view}/{key}".encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class View:
    """Parameters of one augmentation: crop, horizontal flip and colour changes."""

    box: tuple[int, int, int, int]
    """Crop: left, top, right, bottom in pixels of the upright image."""
    flip: bool
    colour: tuple[float, float, float, float]
    """Factors of brightness, contrast and saturation (1 is no change), and the hue rotation in turns, -0.5..0.5."""


def draw_view(augment: AugmentConfig, size: Size, seed: int) -> View:
    """Draw the augmentation of a seed.

    Crop, colour and flip have random streams of their own, so enabling one does not change the others. The values of
    ``random.Random`` are stable across Python versions.

    Args:
        augment: Ranges of the augmentations.
        size: Height and width of the upright image.
        seed: Seed of the view.
    """
    height, width = size
    box = (0, 0, width, height)
    if augment.crop_scale is not None:
        box = _crop(augment, size, random.Random(f"crop/{seed}"))
    hue, rng = augment.hue, random.Random(f"colour/{seed}")
    factors = [1 + (2 * rng.random() - 1) * r for r in (augment.brightness, augment.contrast, augment.saturation)]
    turn = (2 * rng.random() - 1) * hue
    return View(box, random.Random(f"flip/{seed}").random() < augment.flip, (*factors, turn))  # type: ignore[arg-type]


def _crop(augment: AugmentConfig, size: Size, rng: random.Random) -> tuple[int, int, int, int]:
    """Draw the box of a RandomResizedCrop.

    Area and logarithm of the aspect ratio are uniform. After ten boxes that do not fit, the largest centred box with an
    allowed aspect ratio is returned.
    """
    (height, width), (low, high) = size, augment.crop_scale or (1.0, 1.0)
    log_low, log_high = (math.log(r) for r in augment.crop_ratio)
    for _ in range(10):
        area = height * width * (low + (high - low) * rng.random())
        ratio = math.exp(log_low + (log_high - log_low) * rng.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        x, y = rng.random(), rng.random()
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, augment.crop_ratio[0]), augment.crop_ratio[1])
    w, h = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _recolour(image: Image.Image, colour: tuple[float, float, float, float]) -> Image.Image:
    """Change brightness, contrast (about the mean luma), saturation and hue with one affine map of RGB, clipped once.

    The hue is rotated in the YIQ plane, which keeps luma. torchvision rotates it in HSV, which needs several passes.
    """
    if colour == (1.0, 1.0, 1.0, 0.0):
        return image
    brightness, contrast, saturation, turn = colour
    levels = np.array(image.histogram(), dtype=np.float64).reshape(3, 256) @ np.arange(256)
    luma = float(_LUMA @ levels) / (image.width * image.height)
    offset = (1 - contrast) * brightness * luma
    grey = np.outer(np.ones(3), _LUMA)
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    hue = np.linalg.inv(_YIQ) @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _YIQ
    matrix = hue @ (saturation * np.eye(3) + (1 - saturation) * grey) * (brightness * contrast)
    rows = np.concatenate([matrix, np.full((3, 1), offset)], 1)  # both maps keep grey, so the offset needs no mapping
    return image.convert("RGB", tuple(rows.flatten().tolist()))


@dataclass(frozen=True)
class ViewTransform:
    """Convert a decoded image and a seed to a canvas. Equal seeds give equal bytes.

    The image is cropped, recoloured and flipped, then placed by ``geometry``, so padding is never cropped or flipped.

    Args:
        geometry: Placement on the canvas.
        augment: Augmentation; the default is none.

    Raises:
        UserError: A range of ``augment`` is empty or not positive.
    """

    geometry: Geometry
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        scale, ratio = self.augment.crop_scale, self.augment.crop_ratio
        if scale is not None and not 0 < scale[0] <= scale[1]:
            raise UserError(f"augment.crop_scale {list(scale)}: give the smaller share first, above 0")
        if not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"augment.crop_ratio {list(ratio)}: give the smaller ratio first, above 0")

    def __call__(self, image: Image.Image, seed: int) -> tuple[UInt8[Tensor, "3 s s"], Size]:
        """Convert an RGB image.

        Returns:
            Canvas, uint8, of shape (3, s, s), and height and width of the part that is not padding.
        """
        view = draw_view(self.augment, (image.height, image.width), seed)
        if view.box != (0, 0, image.width, image.height):
            image = image.crop(view.box)
        image = _recolour(image, view.colour)
        if view.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.geometry.canvas(image)

    def boxes(self, boxes: Float[Tensor, "n 4"], original_size: Size, seed: int) -> Float[Tensor, "n 4"]:
        """Convert boxes from image pixels to canvas pixels of the view that ``seed`` gives.

        Boxes are clipped to the crop. The box of an object outside the crop has no area.

        Args:
            boxes: xyxy in pixels of the upright image.
            original_size: Height and width of the upright image.
            seed: Seed of the view.

        Returns:
            xyxy in canvas pixels, float32.
        """
        view = draw_view(self.augment, original_size, seed)
        left, top, right, bottom = view.box
        size = torch.tensor([right - left, bottom - top], dtype=torch.float32)
        corners = torch.as_tensor(boxes, dtype=torch.float32).view(-1, 2, 2) - torch.tensor([left, top])
        x, y = corners.clamp(min=0).minimum(size).unbind(-1)
        if view.flip:
            x = size[0] - x.flip(-1)
        return self.geometry.points(torch.stack([x, y], -1), (bottom - top, right - left)).view(-1, 4)

    def masks(
        self, masks: Bool[np.ndarray | Tensor, "*n h w"], original_size: Size, seed: int
    ) -> Bool[Tensor, "*n s s"]:
        """Convert masks from image pixels to the canvas of the view that ``seed`` gives.

        A mask outside the crop becomes empty.

        Args:
            masks: Masks of shape (..., h, w).
            original_size: Height and width of the upright image.
            seed: Seed of the view.

        Raises:
            ValueError: The masks do not have ``original_size``.
        """
        if tuple(masks.shape[-2:]) != tuple(original_size):
            raise ValueError(f"masks of {tuple(masks.shape[-2:])} for an image of {tuple(original_size)}")
        view = draw_view(self.augment, original_size, seed)
        left, top, right, bottom = view.box
        cut = np.asarray(masks)[..., top:bottom, left:right]
        return self.geometry.mask(cut[..., ::-1] if view.flip else cut)

    def objects(
        self, masks: Bool[np.ndarray, "n h w"], original_size: Size, seed: int, side: int
    ) -> tuple[UInt8[Tensor, "n side side"], Float[Tensor, "n 4"]]:
        """Convert masks from image pixels to a grid over the canvas of the view that ``seed`` gives.

        Args:
            masks: Masks of shape (n, h, w).
            original_size: Height and width of the upright image.
            seed: Seed of the view.
            side: Cells of the grid in each direction.

        Returns:
            Share of each cell that an object covers, 0..255, and the tight boxes of what the view shows of the objects,
            xyxy in canvas pixels. Both are zeros for an object outside the crop.
        """
        view = draw_view(self.augment, original_size, seed)
        left, top, right, bottom = view.box
        cut = masks[:, top:bottom, left:right]
        cut = np.ascontiguousarray(cut[..., ::-1] if view.flip else cut)
        boxes = masks_to_boxes(torch.from_numpy(cut))
        placed = self.geometry.points(boxes.view(-1, 2, 2), (bottom - top, right - left))
        return self.geometry.coverage(cut, side), placed.view(-1, 4)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits computed from all settings that change pixels."""
        augment = self.augment.model_dump(mode="json")
        if self.augment.crop_scale is None:
            del augment["crop_ratio"]
        settings = {"revision": _REVISION, "size": self.geometry.image_size, "kind": self.geometry.kind,
                    "augment": augment}  # fmt: skip
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
