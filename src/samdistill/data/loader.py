"""Batches of images on uint8 canvases, in the order of their keys for any number of workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..processes import outlive_signals
from ..types import ImageBatch, UserError
from .skipped import BadInput
from .sources import BadImage, Source
from .transforms import Size, ViewTransform, view_seed

MOST_UNUSABLE = 64
"""Inputs in a row that may be unusable before a run ends."""
T = TypeVar("T")


def next_usable(
    make: Callable[[int, list[BadInput]], T], index: int, count: int, tries: int, what: str = "images",
    verb: str = "read",
) -> T:  # fmt: skip
    """``make`` of the first index from ``index`` on, in a circle of ``count``, that raises no ``BadImage``.

    make: is also given what was unusable on the way. Training never dies of one bad input: the next takes its place.
    Raises ``IndexError`` for an index that is none, which ends a plain ``for``, and ``UserError`` after ``tries`` or
    ``MOST_UNUSABLE`` unusable inputs in a row.
    """
    if not 0 <= index < count:
        raise IndexError(index)
    bad: list[BadInput] = []
    for step in range(min(MOST_UNUSABLE, tries)):
        try:
            return make((index + step) % count, bad)
        except BadImage as error:
            bad.append(error.bad)
    raise UserError(f"{len(bad)} {what} in a row cannot be {verb}, first {bad[0].key}: {bad[0].reason}")


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
        try:
            return self.item(index)
        except BadImage as error:
            return error.bad

    def item(self, index: int) -> ImageItem:
        """Raises ``BadImage`` for an unreadable one."""
        key = self.keys[index]
        image = self.source.load(key)
        seed = view_seed(self.seed, key, self.view)
        canvas, size = self.transform(image, seed)
        return ImageItem(canvas, size, (image.height, image.width), key, seed)


class ReadableImages(Dataset[tuple[ImageItem, tuple[BadInput, ...]]]):
    """The views of ``images``, with what was unreadable on the way: the next readable one takes its place.

    cached: every one was read before, for a cache, so that an unreadable one is a ``UserError``.
    """

    def __init__(self, images: ImageDataset, cached: bool) -> None:
        self.images, self.cached = images, cached

    @property
    def identity(self) -> Sequence[str]:
        """What tells the items from those of other data."""
        return self.images.keys

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[ImageItem, tuple[BadInput, ...]]:
        """Raises ``UserError`` after 64 unreadable images in a row."""
        return next_usable(self._item, index, len(self), len(self))

    def _item(self, index: int, bad: list[BadInput]) -> tuple[ImageItem, tuple[BadInput, ...]]:
        try:
            return self.images.item(index), tuple(bad)
        except BadImage as error:
            if self.cached:
                raise UserError(f"{error.bad.key}: cached, but no longer readable: {error.bad.reason}") from None
            raise


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
