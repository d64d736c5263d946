"""Read and verify a feature store, which one or several ranks wrote."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..types import UserError
from .codecs import SEED_BYTES, Codec, make_codec, unpack_state
from .spec import (
    CODEC_STATE,
    INDEX_DTYPE,
    MANIFEST,
    Manifest,
    RankFiles,
    StoreSpec,
    decode_key,
    encode_key,
    find_ranks,
    key_hash,
)


class Record(NamedTuple):
    """Features of one image.

    Attributes:
        key: Key of the record.
        seed: Seed that reproduces the augmentation of the view.
        features: Float32 map of shape (c, h, w).
    """

    key: str
    seed: int
    features: Float[Tensor, "c h w"]


class Problem(NamedTuple):
    """A fault in a file of the store.

    Attributes:
        key: Key of the affected record; None for bytes that belong to no record.
        file: Name of the file.
        reason: Description of the fault.
    """

    key: str | None
    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}" if self.key is None else f"{self.file}: {self.key!r}: {self.reason}"


def stored_codec(root: Path) -> Codec | None:
    """Return the codec of the store at ``root`` with its parameters, or None if there is no store."""
    if not (Path(root) / MANIFEST).exists():
        return None
    return _load_codec(Path(root), Manifest.load(Path(root)))


def _load_codec(root: Path, manifest: Manifest) -> Codec:
    codec = make_codec(manifest.spec.codec, manifest.spec.shape)
    if codec.record_bytes != manifest.record_bytes:
        raise UserError(
            f"{root / MANIFEST}: record_bytes is {manifest.record_bytes}, but {codec.name} takes {codec.record_bytes}; "
            "restore it, or delete the store and cache again"
        )
    if manifest.codec_digest is not None:
        unpack_state(codec, root / CODEC_STATE, manifest.codec_digest)
    return codec


class _Rank:
    """Files of one rank as they were when the store was opened.

    Memory maps are opened on first use, in the process that uses them.
    """

    def __init__(self, files: RankFiles, record_bytes: int) -> None:
        self.files, self.record_bytes = files, record_bytes
        # Read the index before the sizes: a concurrent writer appends values first, so no whole record looks truncated.
        self.index = files.read_index()
        self.sizes = files.sizes()
        missing = [path.name for path in (files.values, files.index, files.keys) if not path.exists()]
        if missing and any(self.sizes):
            raise UserError(
                f"{files.root}: {', '.join(missing)} missing; restore, or delete rank{files.rank}-* and cache again"
            )
        self._values: np.ndarray | None = None
        self._keys: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_values": None, "_keys": None}

    def raw_key(self, row: int) -> bytes:
        if self._keys is None:
            self._keys = np.asarray(np.memmap(self.files.keys, np.uint8, "r"))
        ends = self.index["key_end"]
        return self._keys[int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes().removesuffix(b"\n")

    def record(self, row: int) -> np.ndarray:
        """Return the bytes of a record, or fewer than ``record_bytes`` if the file was truncated."""
        if self.sizes[0] <= row * self.record_bytes:
            return np.empty(0, np.uint8)
        if self._values is None:
            self._values = np.asarray(np.memmap(self.files.values, np.uint8, "r"))
        return self._values[row * self.record_bytes : (row + 1) * self.record_bytes]

    def key(self, row: int) -> str:
        return decode_key(self.raw_key(row))

    def fault(self, row: int) -> Problem | None:
        """Return the fault of a record, or None."""
        record, values = self.record(row), self.files.values.name
        if len(record) < self.record_bytes:
            return Problem(self.key(row), values, f"record truncated, {len(record)} of {self.record_bytes} bytes")
        if zlib.crc32(record) != self.index["crc32"][row]:
            return Problem(self.key(row), values, "record damaged, its checksum does not match")
        if key_hash(self.raw_key(row)) != self.index["key_hash"][row]:
            return Problem(self.key(row), self.files.keys.name, f"key of record {row} damaged, its hash does not match")
        return None

    def size_problems(self) -> list[Problem]:
        """Report bytes after the last record. Only file sizes are compared; nothing is read."""
        count, entry = len(self), INDEX_DTYPE.itemsize
        owned = (count * self.record_bytes, count * entry, int(self.index["key_end"][-1]) if count else 0)
        paths = (self.files.values, self.files.index, self.files.keys)
        return [
            Problem(None, path.name, f"{held - used} bytes behind record {count}, unfinished or foreign")
            for path, held, used in zip(paths, self.sizes, owned, strict=True)
            if held > used
        ]


class FeatureStore:
    """Random access to the records of a store by key.

    Opening reads the index but no features. A store can be used in threads and in forked workers, and pickled for
    spawned ones. Records that are appended after opening are not visible.

    Attributes:
        root: Folder of the store.
        spec: Description of the features.
        codec: The codec with its parameters.
        bytes_per_record: Bytes of one record on disk, including the seed.

    Example:
        >>> store = FeatureStore(Path("features"))  # doctest: +SKIP
        >>> seeds, features = store.read_batch(store.keys[:8], device="cuda")  # doctest: +SKIP
    """

    def __init__(self, root: Path, expect: StoreSpec | None = None) -> None:
        """Open a store.

        Args:
            root: Folder of the store.
            expect: Required description of the features, or None for any.

        Raises:
            UserError: There is no store, its files are damaged, two ranks wrote the same key, or the store differs from
                ``expect``. The message names the settings that differ.
        """
        self.root = Path(root)
        manifest = Manifest.load(self.root)
        if expect is not None:
            manifest.require(self.root, expect)
        self.spec, self.codec = manifest.spec, _load_codec(self.root, manifest)
        self.bytes_per_record = self.codec.record_bytes
        self._ranks = [_Rank(RankFiles(self.root, rank), self.bytes_per_record) for rank in find_ranks(self.root)]
        self._starts = np.cumsum([0, *map(len, self._ranks)])
        hashes = np.concatenate([rank.index["key_hash"] for rank in self._ranks] or [np.empty(0, np.uint64)])
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        self._refuse_duplicates()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[str]:
        return (rank.key(row) for rank in self._ranks for row in range(len(rank)))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._find(key) is not None

    @property
    def keys(self) -> list[str]:
        """All keys by rank, in the order in which they were written. Iterate over the store to read them one by one."""
        return list(self)

    def _locate(self, place: int) -> tuple[_Rank, int]:
        number = int(np.searchsorted(self._starts, place, "right")) - 1
        return self._ranks[number], place - int(self._starts[number])

    def _find(self, key: str) -> tuple[_Rank, int] | None:
        try:
            raw = encode_key(key)
        except UserError:  # the writer refuses such a key, so it is not in the store
            return None
        wanted = np.uint64(key_hash(raw))
        position = int(np.searchsorted(self._hashes, wanted))
        while position < len(self._hashes) and self._hashes[position] == wanted:
            rank, row = self._locate(int(self._order[position]))
            if rank.raw_key(row) == raw:
                return rank, row
            position += 1
        return None

    def _refuse_duplicates(self) -> None:
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        seen: dict[bytes, str] = {}
        for position in np.union1d(same, same + 1):
            rank, row = self._locate(int(self._order[position]))
            raw, file = rank.raw_key(row), rank.files.keys.name
            if raw in seen:
                raise UserError(
                    f"{self.root}: {decode_key(raw)!r} was cached twice, in {seen[raw]} and {file}; "
                    f"delete rank{rank.files.rank}-* and cache again"
                )
            seen[raw] = file

    def read(self, key: str) -> Record:
        """Read one record and decode it on the CPU.

        Raises:
            UserError: The record is missing or damaged.
        """
        seeds, features = self.read_batch([key])
        return Record(key, int(seeds[0]), features[0])

    def read_batch(
        self, keys: Sequence[str], device: torch.device | str = "cpu"
    ) -> tuple[Int[Tensor, " b"], Float[Tensor, "b c h w"]]:
        """Read several records and decode them on ``device``.

        Returns:
            Seeds, int64, on the CPU, and float32 features of shape (b, c, h, w) on ``device``.

        Raises:
            UserError: A record is missing or damaged.
        """
        seeds, payloads = self.read_payloads(keys)
        return seeds, self.codec.decode_batch(payloads.to(device))

    def read_payloads(self, keys: Sequence[str]) -> tuple[Int[Tensor, " b"], UInt8[Tensor, "b n"]]:
        """Read several records without decoding them, and verify their checksums.

        Loader workers use this method; the main process decodes the payloads with ``codec`` on its device.

        Returns:
            Seeds, int64, and payloads, uint8, of shape (b, n), both on the CPU.

        Raises:
            UserError: A record is missing or damaged.
        """
        seeds = torch.empty(len(keys), dtype=torch.int64)
        payloads = torch.empty(len(keys), self.codec.payload_bytes, dtype=torch.uint8)
        for number, key in enumerate(keys):
            if (found := self._find(key)) is None:
                raise UserError(f"{self.root}: no record of {key!r} among {len(self)}; cache it first")
            rank, row = found
            record = rank.record(row)
            seed, copy = record[:SEED_BYTES], payloads[number].numpy()
            if len(record) == self.bytes_per_record:
                copy[:] = record[SEED_BYTES:]
            # The checksum is computed over the copy, because the file may change after it was copied.
            if len(record) < self.bytes_per_record or zlib.crc32(copy, zlib.crc32(seed)) != rank.index["crc32"][row]:
                fault = rank.fault(row) or f"{key!r} changed while it was read"
                raise UserError(
                    f"{self.root}: {fault}; restore the file, or delete rank{rank.files.rank}-* and cache again"
                )
            seeds[number] = int(seed.view("<i4")[0])
        return seeds, payloads

    @property
    def problems(self) -> list[Problem]:
        """Truncated records and bytes that belong to no record. Only file sizes are compared."""
        found: list[Problem] = []
        for rank in self._ranks:
            found += rank.size_problems()
            faults = (rank.fault(row) for row in range(rank.sizes[0] // self.bytes_per_record, len(rank)))
            found += [fault for fault in faults if fault is not None]
        return found

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
        """Read every record and compare checksums and hashes of keys.

        Args:
            progress: Called with (checked, total) after each record.

        Returns:
            All problems, including those of file sizes.
        """
        found: list[Problem] = []
        checked = 0
        for rank in self._ranks:
            found += rank.size_problems()
            for row in range(len(rank)):
                if (fault := rank.fault(row)) is not None:
                    found.append(fault)
                checked += 1
                if progress is not None:
                    progress(checked, len(self))
        return found
