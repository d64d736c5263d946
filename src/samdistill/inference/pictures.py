"""Images on a model's canvas: a single one, or batches that threads decode while the model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from ..data.images import DECODE_ERRORS, UnreadableImage, read_image
from ..data.loader import worker_count
from ..data.skipped import BadInput
from ..data.transforms import Geometry, Size
from ..io import as_path
from ..reading import one_line
from ..types import ImageBatch, UserError

Picture = str | Path | Image.Image | np.ndarray
"""An image file, a PIL image, or an RGB array (height, width, 3) of dtype uint8."""
_WORKERS = 8


@dataclass(frozen=True, eq=False)
class Laid:
    """An upright RGB image and its canvas for a model.

    Attributes:
        image: The image in RGB.
        name: Path of its file; empty for an image from memory.
        place: Geometry of the canvas.
        canvas: Canvas, uint8, of shape (3, s, s).
        size: Height and width of the part of the canvas that is not padding.
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
    """Open an image in RGB. A file is rotated upright according to its EXIF orientation, a PIL image is not.

    Raises:
        UserError: The file does not exist or cannot be read, or a PIL image cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert("RGB")
    if isinstance(image, Image.Image):
        try:
            return image.convert("RGB")
        except DECODE_ERRORS as error:
            named = getattr(image, "filename", "") or "the PIL image"
            raise UnreadableImage(f"{named} cannot be decoded: {one_line(error)}") from error
    if not Path(image).is_file():
        raise UserError(f"{image}: no such image")
    return read_image(Path(image))


def lay(image: Picture, place: Geometry, name: str = "") -> Laid:
    """Open an image and fit it to the canvas.

    Args:
        image: A file, a PIL image or an array.
        place: Geometry of the canvas.
        name: Path of the file of an image that is already open.

    Raises:
        UserError: The file does not exist or cannot be read.
    """
    picture = open_image(image)
    name = str(as_path(image)) if isinstance(image, str | Path) else name
    return Laid(picture, name, place, *place.canvas(picture))


def image_batch(pictures: Sequence[Laid]) -> ImageBatch:
    """Stack the canvases of pictures into a batch. All must have the same size."""
    return ImageBatch(
        torch.stack([picture.canvas for picture in pictures]),
        torch.tensor([picture.size for picture in pictures]),
        torch.tensor([picture.original for picture in pictures]),
        tuple(picture.name or "image" for picture in pictures),
        torch.zeros(len(pictures), dtype=torch.int64),
    )


def batches(images: Sequence[Picture], place: Geometry, batch_size: int) -> Iterator[tuple[list[Laid], list[BadInput]]]:
    """Read images in order, in batches. Threads decode the files of up to two batches ahead.

    PIL images are read in the calling thread. PIL decodes an image on first use, and two threads must not do that for
    the same object.

    Yields:
        The readable images of a batch, and the files of the batch that cannot be decoded.

    Raises:
        UserError: A file does not exist.
    """

    def one(image: Picture) -> Laid | BadInput:
        try:
            return lay(image, place)
        except UnreadableImage as error:
            return BadInput(str(image), str(error))

    def submit(image: Picture) -> Future[Laid | BadInput]:
        if not isinstance(image, Image.Image):
            return pool.submit(one, image)
        done = Future[Laid | BadInput]()
        done.set_result(one(image))
        return done

    coming = iter(images)
    with ThreadPoolExecutor(worker_count(_WORKERS)) as pool:
        waiting = deque(submit(image) for image in islice(coming, 2 * batch_size))
        while waiting:
            opened = list[Laid | BadInput]()
            for _ in range(min(batch_size, len(waiting))):
                opened.append(waiting.popleft().result())
                waiting.extend(submit(image) for image in islice(coming, 1))
            yield [o for o in opened if isinstance(o, Laid)], [o for o in opened if isinstance(o, BadInput)]
