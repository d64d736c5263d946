"""Normalise images, encode image files, and resample feature maps."""

from __future__ import annotations

from io import BytesIO
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Statistics = tuple[float, float, float]

SAM3_MEAN: Statistics = (0.5, 0.5, 0.5)
SAM3_STD: Statistics = (0.5, 0.5, 0.5)
IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)


def normalise(
    images: UInt8[Tensor, "b 3 h w"], mean: Statistics = SAM3_MEAN, std: Statistics = SAM3_STD
) -> Float[Tensor, "b 3 h w"]:
    """Convert uint8 RGB images to the normalised float32 input of a network.

    Args:
        images: RGB images, 0..255, of shape (b, 3, h, w).
        mean: Mean per channel, in the range 0..1.
        std: Standard deviation per channel, in the range 0..1.

    Returns:
        ``(images / 255 - mean) / std`` of the same shape, on the same device.
    """
    shape, device = (1, 3, 1, 1), images.device
    centred = images.float() / 255 - torch.tensor(mean, device=device).view(shape)
    return centred / torch.tensor(std, device=device).view(shape)


def encoded(image: Image.Image, kind: Literal["PNG", "JPEG"], **options: Any) -> bytes:
    """Encode an image as the bytes of a PNG or JPEG file.

    Args:
        image: The image.
        kind: File format.
        options: Options of Pillow's writer, such as ``quality``.
    """
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def to_grid(maps: Float[Tensor, "n c h w"], grid: tuple[int, int]) -> Float[Tensor, "n c gh gw"]:
    """Resample feature maps to another grid: bilinear, with antialiasing. Maps on this grid are returned unchanged.

    The maps must be two-dimensional. Interpolating a sequence of tokens would mix cells of different rows.

    Args:
        maps: Feature maps of shape (n, c, h, w).
        grid: Height gh and width gw in cells.

    Returns:
        Feature maps of shape (n, c, gh, gw).
    """
    if tuple(maps.shape[-2:]) == grid:
        return maps
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=True)
