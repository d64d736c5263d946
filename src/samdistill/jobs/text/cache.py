"""The cache of a text run: one record per phrase, the teacher's projected tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor

from ...data import BadInput
from ...data.sources import evenly
from ..caching import FIT_IMAGES, CacheCall, refuse_online
from ..recording import Block, Computed, Record, RecordSource
from .parts import TextParts


class PhraseRecords(RecordSource):
    """Record source of phrases. The name of a record is its phrase."""

    unit = "phrases"

    def __init__(self, parts: TextParts, call: CacheCall) -> None:
        refuse_online(parts.config)
        self.parts, self.teacher = parts, parts.teacher().to(call.device)
        self.batch_size, self.verified = parts.config.cache.batch_size, parts.config.cache.verify_records
        self.rank, self.root = call.rank, parts.config.store_root
        self.specs = parts.specs(self.teacher.fingerprint)
        self.phrases = (*parts.trained, *parts.others)[call.rank :: call.world]

    @property
    def problems(self) -> Sequence[BadInput]:
        return self.parts.book.dropped if self.rank == 0 else ()

    def blocks(self) -> Sequence[Block]:
        return self._blocks(self.phrases)

    def _blocks(self, phrases: Sequence[str]) -> list[Block]:
        size = self.batch_size
        return [Block(phrases[start : start + size], None) for start in range(0, len(phrases), size)]

    def compute(self, blocks: Sequence[Block]) -> Iterator[Computed]:
        for block in blocks:
            (tokens,) = self.teacher.features(block.names)
            yield Computed([Record(name, 0, {"": own}) for name, own in zip(block.names, tokens.cpu(), strict=True)])

    def fingerprints(self) -> Mapping[str, str]:
        """Return nothing to compare: a record is named by its whole source, the phrase."""
        return {}

    def sample(self, store: str) -> Iterator[Tensor]:
        return (record.tensors[store] for record in self._computed(evenly(self.phrases, FIT_IMAGES)))

    def probe(self, done: Collection[str]) -> Iterator[Record]:
        return self._computed(evenly([phrase for phrase in self.phrases if phrase in done], self.verified))

    def _computed(self, phrases: Sequence[str]) -> Iterator[Record]:
        return (record for computed in self.compute(self._blocks(phrases)) for record in computed.records)
