"""Feature maps of image views, for any job: written by ``cache``, read in training, or computed in training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Self, TypeVar

from torch import Tensor

from ..config.parts import CachedRun
from ..data import BadInput, ImageDataset, image_loader, record_key
from ..data.fingerprints import fingerprints
from ..data.sources import evenly
from ..dist import process_rank
from ..store.changes import refuse_changed
from ..teachers import MapSignals, RunningMaps, StoredMaps
from .caching import (
    FIT_IMAGES,
    CacheCall,
    Specs,
    is_cached,
    left_out_of,
    open_stores,
    prove,
    refuse_missing,
    refuse_online,
)
from .images import Images
from .recording import Block, Computed, Record, RecordSource, view_blocks

AnyConfig = TypeVar("AnyConfig", bound=CachedRun)


class ViewParts(Images[AnyConfig]):
    """Parts of a job that trains on a teacher's feature maps of images.

    Subclasses set ``what``, the name of the maps in error messages.
    """

    what = "features"

    @property
    @abstractmethod
    def keys(self) -> Sequence[str]:
        """Keys of the training images, the same in every process."""

    @abstractmethod
    def specs(self, fingerprint: str) -> Specs:
        """Return the specifications of the stores, one per map, without reading weights.

        Args:
            fingerprint: Fingerprint of the teacher.
        """

    @abstractmethod
    def running(self) -> RunningMaps:
        """Load the teacher on the CPU."""

    def view(self, index: int, keys: Sequence[str] | None = None) -> ImageDataset:
        """Return view ``index`` of all training images, or of ``keys``."""
        wanted = list(self.keys if keys is None else keys)
        return ImageDataset(self.train_source, self.transform, wanted, self.config.data.seed, index)

    @cached_property
    def trained_keys(self) -> list[str]:
        """Keys of the training images without those that the cache skipped."""
        skipped = left_out_of(self.config.store_root, self.train_source) if not self.config.online else {}
        return [key for key in self.keys if key not in skipped]

    def source_fingerprints(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the fingerprint of the image of each record of ``keys``."""
        found = fingerprints(self.train_source.fingerprint, keys)
        return {record_key(key, view): found[key] for view in range(self.config.data.views) for key in keys}

    def checkable(self) -> Self:
        """Return these parts if there is a cache, else those of the same run with a running teacher."""
        cached = is_cached(self.config.store_root, self.specs(""))
        return self if cached else type(self)(self.config.run_online())

    def signals(self, proven: bool = True) -> MapSignals:
        """Return the running teacher or its cache.

        Args:
            proven: On rank 0, open the teacher and check that it and the images are those that were cached.

        Raises:
            UserError: A view is neither cached nor listed as skipped, or the cache does not fit.
        """
        if self.config.online:
            return self.running()
        root, views = self.config.store_root, self.config.data.views
        stores, keys = open_stores(root, self.specs(""), self.what), self.trained_keys
        if proven and process_rank() == 0:
            refuse_changed(root, self.source_fingerprints(keys))
            prove(root, self.specs(self.running().fingerprint))
        names = [record_key(key, view) for view in range(views) for key in keys]
        missing = [name for name in names if any(name not in store for store in stores.values())]
        refuse_missing(root, missing, len(names))
        return StoredMaps.of_views(list(stores.values()), self.config.data.seed, views)


class ViewMaps(RecordSource):
    """Record source with one record per view of an image and store: a map (c, h, w), and the seed of the view."""

    def __init__(self, parts: ViewParts[AnyConfig], call: CacheCall) -> None:
        refuse_online(parts.config)
        self.parts, self.maps = parts, parts.running()
        self.maps.to(call.device)
        self.batch_size = parts.config.cache.batch_size
        self.verified = parts.config.cache.verify_records
        self.rank, self.root = call.rank, parts.config.store_root
        self.specs = parts.specs(self.maps.fingerprint)
        self.keys = parts.keys[call.rank :: call.world]

    @property
    def problems(self) -> Sequence[BadInput]:
        return self.parts.train_source.problems if self.rank == 0 else ()

    def blocks(self) -> Sequence[Block]:
        return view_blocks(self.keys, self.parts.config.data.views, self.batch_size)

    def compute(self, blocks: Sequence[Block]) -> Iterator[Computed]:
        for view, group in groupby(blocks, key=lambda block: block.about[0]):
            images = self.parts.view(view, [key for block in group for key in block.about[1]])
            for batch, bad in image_loader(images, self.batch_size, self.parts.config.data.workers):
                if batch is None:
                    yield Computed((), bad)
                    continue
                maps = [each.cpu() for each in self.maps.answer(batch, self.maps.read(batch))]
                names = [record_key(key, view) for key in batch.keys]
                found = zip(names, batch.seeds.tolist(), zip(*maps, strict=True), strict=True)
                yield Computed(
                    [Record(name, seed, dict(zip(self.specs, own, strict=True))) for name, seed, own in found], bad
                )

    def fingerprints(self) -> Mapping[str, str]:
        return self.parts.source_fingerprints(self.keys)

    def sample(self, store: str) -> Iterator[Tensor]:
        keys = self.parts.keys
        some = keys[:: max(1, len(keys) // FIT_IMAGES)][:FIT_IMAGES]
        return (record.tensors[store] for record in self._first_views(some))

    def probe(self, done: Collection[str]) -> Iterator[Record]:
        mine = [key for key in self.keys if key in done]
        return self._first_views(evenly(mine, self.verified))

    def _first_views(self, keys: Sequence[str]) -> Iterator[Record]:
        found = self.compute(view_blocks(keys, 1, self.batch_size))
        return (record for computed in found for record in computed.records)
