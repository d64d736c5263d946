"""From a decoded image to the model's canvas: seeded, replayable views, and the geometry that places them."""

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
from ..types import UserError

PAD = 128
"""Value of padded pixels: mid-grey, zero after SAM 3's normalisation, as SAM pads after normalising."""
_REVISION = 1  # part of every fingerprint: raise it when a change here changes pixels
_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])

Size = tuple[int, int]
"""Height, width."""


@dataclass(frozen=True)
class Geometry:
    """How an image lies on the square canvas of ``image_size`` pixels.

    ``square`` stretches it over the whole canvas, which SAM 3 was trained with; ``longest_side`` keeps its aspect and
    pads at the bottom and the right, which SAM was trained with. Coordinates are continuous: pixel i spans i..i+1.
    """

    image_size: int
    kind: Literal["square", "longest_side"] = "square"

    def __post_init__(self) -> None:
        if self.kind not in ("square", "longest_side"):
            raise UserError(f"geometry {self.kind!r}: there is square and longest_side")
        if self.image_size < 1:
            raise UserError(f"image_size {self.image_size}: the canvas needs at least one pixel")

    def placed(self, size: Size) -> Size:
        """Height and width on the canvas of an image of ``size``; it starts at the top left corner."""
        if self.kind == "square":
            return self.image_size, self.image_size
        scale = self.image_size / max(size)
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))

    def canvas(self, image: Image.Image) -> tuple[UInt8[Tensor, "3 s s"], Size]:
        """RGB image to canvas (bilinear with antialiasing, padding ``PAD``) and its placed height and width.

        Resized by PyTorch's fixed-point kernel: within 2 grey levels of Pillow's and torchvision's, at a third of
        Pillow's time.
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
        """Masks in file pixels to the canvas: each canvas pixel takes the file pixel under its centre; padding is False."""  # noqa: E501
        source = np.asarray(mask)
        size = (source.shape[-2], source.shape[-1])
        valid = self.placed(size)
        rows, columns = (((torch.arange(v) + 0.5) * (s / v)).long().clamp(max=s - 1).numpy()
                         for v, s in zip(valid, size, strict=True))  # fmt: skip
        placed = np.zeros((*source.shape[:-2], self.image_size, self.image_size), bool)
        # axis by axis in NumPy: a tenth of the time of PyTorch's indexing by pairs
        placed[..., : valid[0], : valid[1]] = source.take(rows, -2).take(columns, -1)
        return torch.from_numpy(placed)

    def points(self, xy: Float[Tensor, "*n 2"], original_size: Size) -> Float[Tensor, "*n 2"]:
        """x, y in file pixels to canvas pixels. Boxes: ``points(boxes.view(..., 2, 2), size).view(..., 4)``."""
        height, width = self.placed(original_size)
        scale = [width / original_size[1], height / original_size[0]]
        return torch.as_tensor(xy, dtype=torch.float32) * torch.tensor(scale)

    def masks_back(self, logits: Float[Tensor, "*n s s"], original_size: Size) -> Float[Tensor, "*n h w"]:
        """Logits on the canvas to logits on the file's pixels: the padding is cut off, the rest resized bilinearly."""
        side = self.image_size
        if logits.shape[-2:] != (side, side):
            raise ValueError(f"masks of {tuple(logits.shape[-2:])} are not on the {side} x {side} canvas")
        height, width = self.placed(original_size)
        valid = logits[..., :height, :width].reshape(-1, 1, height, width).float()
        back = F.interpolate(valid, original_size, mode="bilinear", align_corners=False)
        return back.view(*logits.shape[:-2], *original_size)


def view_seed(seed: int, key: str, view: int) -> int:
    """The 31-bit seed of one augmented view of one image, the same on every platform."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{view}/{key}".encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class View:
    """One drawn augmentation: what is cut out of the image, whether it is mirrored, and how colours change."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels of the upright file."""
    flip: bool
    colour: tuple[float, float, float, float]
    """Factors of brightness, contrast and saturation (1 changes nothing) and a hue turn in -0.5..0.5."""


def draw_view(augment: AugmentConfig, size: Size, seed: int) -> View:
    """The view that ``seed`` stands for. Each kind of augmentation has its own stream of ``random.Random``, whose
    values Python keeps stable across versions, so turning one on leaves the others as they were."""
    height, width = size
    box = (0, 0, width, height)
    if augment.crop_scale is not None:
        box = _crop(augment, size, random.Random(f"crop/{seed}"))
    hue, rng = augment.hue, random.Random(f"colour/{seed}")
    factors = [1 + (2 * rng.random() - 1) * r for r in (augment.brightness, augment.contrast, augment.saturation)]
    turn = (2 * rng.random() - 1) * hue
    return View(box, random.Random(f"flip/{seed}").random() < augment.flip, (*factors, turn))  # type: ignore[arg-type]


def _crop(augment: AugmentConfig, size: Size, rng: random.Random) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box: area and log aspect uniform, ten tries, then the largest centred one in range."""
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
    """Brightness, contrast about the mean luma, saturation and hue as one affine map of RGB, clipped once.

    The hue turns in the YIQ plane, so luma stays; torchvision turns it in HSV, which needs several passes.
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
    rows = np.concatenate([matrix, np.full((3, 1), offset)], 1)  # grey, hence the offset, survives both maps
    return image.convert("RGB", tuple(rows.flatten().tolist()))


@dataclass(frozen=True)
class ViewTransform:
    """A decoded image and a seed to a canvas. The same seed gives the same bytes.

    The crop is cut out, recoloured and mirrored, then placed by ``geometry``: padding is never mirrored or cropped.
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
        """RGB image to uint8 canvas and the height and width of its part that is not padding."""
        view = draw_view(self.augment, (image.height, image.width), seed)
        if view.box != (0, 0, image.width, image.height):
            image = image.crop(view.box)
        image = _recolour(image, view.colour)
        if view.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.geometry.canvas(image)

    def boxes(self, boxes: Float[Tensor, "n 4"], original_size: Size, seed: int) -> Float[Tensor, "n 4"]:
        """xyxy in file pixels to canvas pixels, laid as the same ``seed`` lays the image.

        Cut off at the edge of the crop: of an object that was cropped away a box without area is left.
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
        """Masks in file pixels to the canvas, laid as the same ``seed`` lays the image.

        What the crop leaves out is gone, which may be all of a mask. Raises ``ValueError`` for masks that are not of
        ``original_size``: they cannot belong to the image.
        """
        if tuple(masks.shape[-2:]) != tuple(original_size):
            raise ValueError(f"masks of {tuple(masks.shape[-2:])} for an image of {tuple(original_size)}")
        view = draw_view(self.augment, original_size, seed)
        left, top, right, bottom = view.box
        cut = np.asarray(masks)[..., top:bottom, left:right]
        return self.geometry.mask(cut[..., ::-1] if view.flip else cut)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over every setting that changes pixels."""
        augment = self.augment.model_dump(mode="json")
        if self.augment.crop_scale is None:
            del augment["crop_ratio"]
        settings = {"revision": _REVISION, "size": self.geometry.image_size, "kind": self.geometry.kind,
                    "augment": augment}  # fmt: skip
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
