"""Batches of images on uint8 canvases, in the order of their keys for any number of workers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..processes import outlive_signals
from ..types import ImageBatch
from .skipped import BadInput
from .sources import BadImage, Source
from .transforms import Size, ViewTransform, view_seed


def record_key(key: str, view: int) -> str:
    """Return the name under which a view of an image is cached.

    View 0 has the image's key. A key contains no two consecutive slashes, so views of different images never share a
    name.

    Example:
        >>> record_key("a", 0), record_key("a", 2)
        ('a', 'a//2')
    """
    return key if view == 0 else f"{key}//{view}"


class ImageItem(NamedTuple):
    """One view of an image.

    Attributes:
        image: RGB canvas, uint8, of shape (3, s, s).
        size: Height and width of the part of the canvas that is not padding.
        original_size: Height and width of the upright image file.
        key: Key of the image.
        seed: Seed that reproduces the augmentation.
    """

    image: UInt8[Tensor, "3 s s"]
    size: Size
    original_size: Size
    key: str
    seed: int


class ImageDataset(Dataset[ImageItem | BadInput]):
    """View number ``view`` of each key.

    An item depends on its key, ``seed`` and ``view`` only. An unreadable image gives a ``BadInput`` in its place, so
    the length and the indices do not change.

    Args:
        source: The images.
        transform: Augmentation and geometry.
        keys: Keys of the items, in order.
        seed: Seed of the run.
        view: Number of the view.
    """

    def __init__(
        self, source: Source, transform: ViewTransform, keys: Sequence[str], seed: int = 0, view: int = 0
    ) -> None:
        self.source, self.transform, self.keys = source, transform, list(keys)
        self.seed, self.view = seed, view

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> ImageItem | BadInput:
        key = self.keys[index]
        try:
            image = self.source.load(key)
        except BadImage as error:
            return error.bad
        seed = view_seed(self.seed, key, self.view)
        canvas, size = self.transform(image, seed)
        return ImageItem(canvas, size, (image.height, image.width), key, seed)


def collate_images(items: Sequence[ImageItem | BadInput]) -> tuple[ImageBatch | None, list[BadInput]]:
    """Collate the readable items into one batch.

    Returns:
        The batch, or None if no item is readable, and the unreadable items.
    """
    good = [item for item in items if isinstance(item, ImageItem)]
    bad = [item for item in items if isinstance(item, BadInput)]
    if not good:
        return None, bad
    images, sizes, original_sizes, keys, seeds = zip(*good, strict=True)
    batch = ImageBatch(
        torch.stack(images), torch.tensor(sizes), torch.tensor(original_sizes), keys,
        torch.tensor(seeds, dtype=torch.int64),
    )  # fmt: skip
    return batch, bad


def worker_count(wanted: int) -> int:
    """Limit a number of loader processes to the available CPU cores. Batches are equal for any number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, cores)


def image_loader(
    dataset: ImageDataset, batch_size: int, workers: int = 0
) -> DataLoader[tuple[ImageBatch | None, list[BadInput]]]:
    """Load batches in the order of ``dataset.keys``.

    Args:
        dataset: The images.
        batch_size: Images per batch; the last batch may have fewer.
        workers: Loader processes. The batches are equal for any number.
    """
    processes = worker_count(workers)
    return DataLoader(
        dataset,
        batch_size,
        num_workers=processes,
        collate_fn=collate_images,
        persistent_workers=processes > 0,
        worker_init_fn=outlive_signals,
    )
