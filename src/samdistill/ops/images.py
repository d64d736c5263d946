"""From uint8 images to what a network reads, and to what a file holds."""

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
    """RGB 0..255 to float32 with the given mean and standard deviation of the 0..1 range."""
    shape, device = (1, 3, 1, 1), images.device
    centred = images.float() / 255 - torch.tensor(mean, device=device).view(shape)
    return centred / torch.tensor(std, device=device).view(shape)


def encoded(image: Image.Image, kind: Literal["PNG", "JPEG"], **options: Any) -> bytes:
    """The content of an image file. options: of Pillow's writer, such as ``quality``."""
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def to_grid(maps: Float[Tensor, "n c h w"], grid: tuple[int, int]) -> Float[Tensor, "n c gh gw"]:
    """Maps of another stride on the wanted grid, as grids: in a row of tokens the rows would slide past each other."""
    if tuple(maps.shape[-2:]) == grid:
        return maps
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=True)
