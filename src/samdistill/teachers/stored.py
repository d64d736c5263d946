"""Signals that were computed before: read from feature stores, whatever the job that wrote them."""

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
    """Names of records, and the augmentation seed that each is to have."""

    names: list[str]
    seeds: list[int]


def frame_key(key: str, frame: int) -> str:
    """The record of one frame of a video."""
    return f"{key}@{frame}"


def frame_records(asked: Sequence[Frame]) -> Records:
    """Of frames of videos, which are never augmented."""
    return Records([frame_key(key, number) for key, number in asked], [0] * len(asked))


def view_name(key: str, seed: int, data_seed: int, views: int) -> str:
    """The record of the view of an image that ``seed`` replays.

    Raises ``UserError`` for a seed that is none of the ``views`` cached ones.
    """
    for view in range(views):
        if view_seed(data_seed, key, view) == seed:
            return record_key(key, view)
    raise UserError(f"{key}: the batch shows none of the {views} cached views: is data.seed as it was?")


def view_records(asked: ImageBatch, data_seed: int, views: int) -> Records:
    """Of the views of images in a batch. data_seed, views: of the data, which tell the view."""
    seeds = asked.seeds.tolist()
    return Records([view_name(key, seed, data_seed, views) for key, seed in zip(asked.keys, seeds, strict=True)], seeds)


class StoredMaps(Generic[Asked]):
    """``Signals`` from feature stores: no teacher is in memory. Pickles to loader workers, as its stores do.

    fingerprint: of the teacher whose maps they are.

    Example:
        >>> StoredMaps.of_views([store], data_seed=0, views=1).read(images)  # doctest: +SKIP
    """

    def __init__(self, stores: Sequence[FeatureStore], records: Callable[[Asked], Records]) -> None:
        """stores: one per map of the answer, cached together. records: of what is asked; it has to pickle."""
        self.stores, self.records = list(stores), records
        self.fingerprint, self.device = self.stores[0].spec.teacher, torch.device("cpu")

    @classmethod
    def of_views(cls, stores: Sequence[FeatureStore], data_seed: int, views: int) -> StoredMaps[ImageBatch]:
        return StoredMaps(stores, partial(view_records, data_seed=data_seed, views=views))

    @classmethod
    def of_frames(cls, stores: Sequence[FeatureStore]) -> StoredMaps[Sequence[Frame]]:
        return StoredMaps(stores, frame_records)

    def read(self, asked: Asked) -> Maps:
        """A map per store (n, c, h, w), float32 on the CPU, in the order of what is asked; repeats are allowed.

        Raises ``UserError`` that names a record that is missing or damaged, or shows another view.
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
        """What was read, on the device."""
        return tuple(maps.to(self.device, non_blocking=True) for maps in read)

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
