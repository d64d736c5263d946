"""The teacher's image embedding of every view, as records."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby

from torch import Tensor

from ...data import BadInput, image_loader, record_key
from ...data.sources import evenly
from ...teachers.base import IMAGE_EMBEDDING
from ..caching import FIT_IMAGES, CacheCall
from ..recording import Block, Computed, Record, RecordSource, view_blocks
from .config import EncoderRunConfig
from .parts import EncoderParts


class Embeddings(RecordSource):
    """One record per view of an image: the embedding (c, h, w), and the seed that replays the view."""

    def __init__(self, config: EncoderRunConfig, call: CacheCall) -> None:
        self.parts = EncoderParts(config)
        self.teacher = self.parts.build_teacher(call.device)
        self.rank, self.root = call.rank, config.store_root
        self.specs = {"": self.parts.store_spec(self.teacher)}
        self.keys = self.parts.train_source.keys[call.rank :: call.world]

    @property
    def problems(self) -> Sequence[BadInput]:
        return self.parts.train_source.problems if self.rank == 0 else ()

    def blocks(self) -> Sequence[Block]:
        config = self.parts.config
        return view_blocks(self.keys, config.data.views, config.cache.batch_size)

    def compute(self, blocks: Sequence[Block]) -> Iterator[Computed]:
        config = self.parts.config
        for view, group in groupby(blocks, key=lambda block: block.about[0]):
            images = self.parts.view(view, [key for block in group for key in block.about[1]])
            for batch, bad in image_loader(images, config.cache.batch_size, config.data.workers):
                if batch is None:
                    yield Computed((), bad)
                    continue
                features = self.teacher.extract(batch.to(self.teacher.device), (IMAGE_EMBEDDING,))[IMAGE_EMBEDDING]
                names = (record_key(key, view) for key in batch.keys)
                found = zip(names, batch.seeds.tolist(), features.cpu(), strict=True)
                yield Computed([Record(name, seed, {"": feature}) for name, seed, feature in found], bad)

    def fingerprints(self) -> Mapping[str, str]:
        return self.parts.source_fingerprints(self.keys)

    def sample(self, store: str) -> Iterator[Tensor]:
        keys = self.parts.train_source.keys
        some = keys[:: max(1, len(keys) // FIT_IMAGES)][:FIT_IMAGES]
        return (record.tensors[store] for record in self._first_views(some))

    def probe(self, done: Collection[str]) -> Iterator[Record]:
        mine = [key for key in self.keys if key in done]
        return self._first_views(evenly(mine, self.parts.config.cache.verify_records))

    def _first_views(self, keys: Sequence[str]) -> Iterator[Record]:
        found = self.compute(view_blocks(keys, 1, self.parts.config.cache.batch_size))
        return (record for computed in found for record in computed.records)
