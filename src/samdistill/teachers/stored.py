"""Signals that are read from feature stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch

from ..data import record_key, view_seed
from ..store import FeatureStore
from ..types import ImageBatch, UserError
from .base import Frame, Maps

Asked = TypeVar("Asked")


class Records(NamedTuple):
    """Names of records, and the augmentation seed that each must have."""

    names: list[str]
    seeds: list[int]


def frame_key(key: str, frame: int) -> str:
    """Return the name of the record of one video frame."""
    return f"{key}@{frame}"


def frame_records(asked: Sequence[Frame]) -> Records:
    """Return the records of video frames. Frames are not augmented, so the seeds are 0."""
    return Records([frame_key(key, number) for key, number in asked], [0] * len(asked))


def phrase_records(asked: Sequence[str]) -> Records:
    """Return the records of phrases. They are not augmented, so the seeds are 0."""
    return Records(list(asked), [0] * len(asked))


def view_name(key: str, seed: int, data_seed: int, views: int) -> str:
    """Return the name of the record of the view that ``seed`` reproduces.

    Args:
        key: Key of the image.
        seed: Seed of the view.
        data_seed: ``data.seed`` of the run.
        views: Number of cached views per image.

    Raises:
        UserError: None of the ``views`` cached views has this seed.
    """
    for view in range(views):
        if view_seed(data_seed, key, view) == seed:
            return record_key(key, view)
    raise UserError(f"{key}: none of the {views} cached views is in the batch: set data.seed as it was, or cache again")


def view_records(asked: ImageBatch, data_seed: int, views: int) -> Records:
    """Return the records of the views in a batch. ``data_seed`` and ``views`` as in ``view_name``."""
    seeds = asked.seeds.tolist()
    return Records([view_name(key, seed, data_seed, views) for key, seed in zip(asked.keys, seeds, strict=True)], seeds)


class StoredMaps(Generic[Asked]):
    """``Signals`` from feature stores. No teacher is in memory. It can be pickled to loader workers.

    Attributes:
        fingerprint: Fingerprint of the teacher that made the maps.

    Example:
        >>> StoredMaps.of_views([store], data_seed=0, views=1).read(images)  # doctest: +SKIP
    """

    def __init__(self, stores: Sequence[FeatureStore], records: Callable[[Asked], Records]) -> None:
        """Set up the signals.

        Args:
            stores: One store per map, cached together.
            records: Function from a request to its records. It must be picklable.
        """
        self.stores, self.records = list(stores), records
        self.fingerprint, self.device = self.stores[0].spec.teacher, torch.device("cpu")

    @classmethod
    def of_views(cls, stores: Sequence[FeatureStore], data_seed: int, views: int) -> StoredMaps[ImageBatch]:
        """Return signals of views of images. ``data_seed`` and ``views`` as in ``view_name``."""
        return StoredMaps(stores, partial(view_records, data_seed=data_seed, views=views))

    @classmethod
    def of_frames(cls, stores: Sequence[FeatureStore]) -> StoredMaps[Sequence[Frame]]:
        """Return signals of video frames."""
        return StoredMaps(stores, frame_records)

    def read(self, asked: Asked) -> Maps:
        """Return one map (n, c, h, w) per store, float32 on the CPU, in the order of the request. Repeats are allowed.

        Raises:
            UserError: A record is missing or damaged, or has another seed.
        """
        names, seeds = self.records(asked)
        found = []
        for store in self.stores:
            made_with, maps = store.read_batch(names)
            for name, seed, wanted in zip(names, made_with.tolist(), seeds, strict=True):
                if seed != wanted:
                    raise UserError(
                        f"{name}: the cache was made with augmentation seed {seed}, this run draws {wanted}: "
                        "set data.seed as it was, or cache again"
                    )
            found.append(maps)
        return tuple(found)

    def answer(self, asked: Asked, read: Maps) -> Maps:
        """Move what was read to the device."""
        return tuple(maps.to(self.device, non_blocking=True) for maps in read)

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
