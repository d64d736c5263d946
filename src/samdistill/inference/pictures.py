"""Images on a model's canvas: one, or many that threads decode while the model is at work on those before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from ..data.images import UnreadableImage, read_image
from ..data.loader import worker_count
from ..data.skipped import BadInput
from ..data.transforms import Geometry, Size
from ..io import as_path
from ..types import ImageBatch, UserError

Picture = str | Path | Image.Image | np.ndarray
"""A file, an opened image, or an array (height, width, 3) of uint8."""
_WORKERS = 8


@dataclass(frozen=True, eq=False)
class Laid:
    """An upright RGB image, and how it lies on the canvas of a model.

    name: path of its file, empty for an image from memory. size: height and width of the canvas' unpadded part.
    """

    image: Image.Image
    name: str
    place: Geometry
    canvas: UInt8[Tensor, "3 s s"]
    size: Size

    @property
    def original(self) -> Size:
        """Height and width of the image."""
        return self.image.height, self.image.width


def open_image(image: Picture) -> Image.Image:
    """In RGB; a file is turned upright, an opened image taken as it lies. Raises ``UserError`` for what is no image."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert("RGB")
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not Path(image).is_file():
        raise UserError(f"{image}: no such image")
    return read_image(Path(image))


def lay(image: Picture, place: Geometry, name: str = "") -> Laid:
    """Open an image and lay it on the canvas. name: of its file, where it is opened already.

    Raises ``UserError`` for what is no image.
    """
    picture = open_image(image)
    name = str(as_path(image)) if isinstance(image, str | Path) else name
    return Laid(picture, name, place, *place.canvas(picture))


def image_batch(pictures: Sequence[Laid]) -> ImageBatch:
    """Canvases of one size as a batch."""
    return ImageBatch(
        torch.stack([picture.canvas for picture in pictures]),
        torch.tensor([picture.size for picture in pictures]),
        torch.tensor([picture.original for picture in pictures]),
        tuple(picture.name or "image" for picture in pictures),
        torch.zeros(len(pictures), dtype=torch.int64),
    )


def batches(images: Sequence[Picture], place: Geometry, batch_size: int) -> Iterator[tuple[list[Laid], list[BadInput]]]:
    """The images in their order, ``batch_size`` at a time, and the files among them that cannot be read.

    Threads decode up to two batches ahead. Raises ``UserError`` for a file that is not there.
    """

    def one(image: Picture) -> Laid | BadInput:
        try:
            return lay(image, place)
        except UnreadableImage as error:
            return BadInput(str(image), str(error))

    coming = iter(images)
    with ThreadPoolExecutor(worker_count(_WORKERS)) as pool:
        waiting = deque(pool.submit(one, image) for image in islice(coming, 2 * batch_size))
        while waiting:
            opened = list[Laid | BadInput]()
            for _ in range(min(batch_size, len(waiting))):
                opened.append(waiting.popleft().result())
                waiting.extend(pool.submit(one, image) for image in islice(coming, 1))
            yield [o for o in opened if isinstance(o, Laid)], [o for o in opened if isinstance(o, BadInput)]
