"""Held-out images and their objects on the model's canvas, in batches; what cannot be read is listed."""

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
    """One image on its canvas with the objects annotated on it.

    size: height and width of the canvas' unpadded part. left_out: objects dropped, being empty at this resolution or
    above the limit.
    """

    key: str
    image: UInt8[Tensor, "3 s s"]
    size: tuple[int, int]
    original_size: tuple[int, int]
    masks: Bool[Tensor, "n s s"]
    left_out: int


def load_example(source: Source, geometry: Geometry, key: str, max_objects: int) -> Example:
    """Read one image; above ``max_objects`` objects, that many spread over the order of their area are kept.

    A crowd is no object. Raises BadImage for an image or annotation that cannot be read.
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
    """For each run of ``batch_size`` keys how many there were and what could be read; the rest joins ``skipped``."""
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
    """The images, their objects padded to one count, and which objects are real."""
    images = ImageBatch(
        torch.stack([example.image for example in examples]),
        torch.tensor([example.size for example in examples]),
        torch.tensor([example.original_size for example in examples]),
        tuple(example.key for example in examples),
        torch.zeros(len(examples), dtype=torch.int64),
    )
    masks, valid = pad_masks([example.masks for example in examples])
    return images, masks, valid
