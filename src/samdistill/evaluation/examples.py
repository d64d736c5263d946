"""Images and their annotated objects on a model's canvas, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from ..data.prompts import pad_masks
from ..data.skipped import BadInput, leave_out
from ..data.sources import BadImage, Source, evenly
from ..data.transforms import Geometry
from ..types import ImageBatch

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One image on its canvas, with its annotated objects.

    Attributes:
        key: Key of the image.
        image: RGB canvas, 0..255, of shape (3, s, s).
        size: Height and width of the canvas without padding.
        original_size: Height and width of the image file.
        masks: n masks on the canvas.
        left_out: Number of objects that were omitted, because they have no pixel on the canvas or exceed the limit.
    """

    key: str
    image: UInt8[Tensor, "3 s s"]
    size: tuple[int, int]
    original_size: tuple[int, int]
    masks: Bool[Tensor, "n s s"]
    left_out: int


def load_example(source: Source, geometry: Geometry, key: str, max_objects: int) -> Example:
    """Read one image and its objects. Crowd annotations are not objects.

    Args:
        source: The data set.
        geometry: Placement of images on the canvas.
        key: Key of the image.
        max_objects: Largest number of objects. From more, that many are chosen, evenly spaced in the order of area.

    Raises:
        BadImage: The image or its annotation cannot be read.
    """
    picture = source.load(key)
    image, size = geometry.canvas(picture)
    instances = [instance for instance in source.instances(key) if not instance.crowd]
    chosen = evenly(sorted(instances, key=lambda instance: int(instance.mask.sum())), max_objects)
    masks = [mask for mask in (geometry.mask(instance.mask) for instance in chosen) if bool(mask.any())]
    stacked = torch.stack(masks) if masks else torch.zeros(0, *image.shape[-2:], dtype=torch.bool)
    original = (picture.height, picture.width)
    return Example(key, image, (size[0], size[1]), original, stacked, len(instances) - len(masks))


def load_batches(
    source: Source,
    geometry: Geometry,
    keys: Sequence[str],
    batch_size: int,
    max_objects: int,
    skipped: list[BadInput],
) -> Iterator[tuple[int, list[Example]]]:
    """Read images in batches.

    Args:
        source: The data set.
        geometry: Placement of images on the canvas.
        keys: Keys of the images.
        batch_size: Keys per batch.
        max_objects: Largest number of objects per image.
        skipped: List to which images that cannot be read are appended.

    Yields:
        Number of keys of the batch, and the images that could be read.
    """
    for start in range(0, len(keys), batch_size):
        wanted = keys[start : start + batch_size]
        examples = []
        for key in wanted:
            try:
                examples.append(load_example(source, geometry, key, max_objects))
            except BadImage as error:
                skipped.append(error.bad)
                leave_out([error.bad])
        yield len(wanted), examples


def to_batch(examples: Sequence[Example]) -> tuple[ImageBatch, Bool[Tensor, "b n s s"], Bool[Tensor, "b n"]]:
    """Collate images.

    Returns:
        The images, their masks padded to the largest number of objects n, of shape (b, n, s, s), and which masks are
        not padding, of shape (b, n).
    """
    images = ImageBatch(
        torch.stack([example.image for example in examples]),
        torch.tensor([example.size for example in examples]),
        torch.tensor([example.original_size for example in examples]),
        tuple(example.key for example in examples),
        torch.zeros(len(examples), dtype=torch.int64),
    )
    masks, valid = pad_masks([example.masks for example in examples])
    return images, masks, valid
