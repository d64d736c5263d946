"""Append records to a store. A run that was killed is resumed at the record where it ended.

A record consists of three appends: its value, its index entry and the line of its key. It counts when all three are
complete and consistent. If a process is killed between two bytes, the complete records remain, and the incomplete end
is removed on the next opening.

Every ``SYNC_RECORDS`` records, and on ``close``, the files are synchronised to disk (fsync). A power failure can damage
anything that was written later, in any order. On opening, the checksums of the last ``SYNC_RECORDS`` records are
verified, and the files are truncated at the first that fails. ``FeatureStore.verify`` finds earlier damage.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ..io import make_folder, open_records, sync_folder, write_bytes
from ..locks import locked
from ..types import UserError
from .codecs import Codec, FeatureError, pack_state
from .spec import (
    CODEC_STATE,
    INDEX_DTYPE,
    MANIFEST,
    Manifest,
    RankFiles,
    StoreSpec,
    encode_key,
    find_ranks,
    key_hash,
    pack_entry,
    writing,
)

SYNC_RECORDS = 32
"""Number of records between two calls of fsync."""


class FeatureStoreWriter:
    """Writes the records of one rank. Use it as a context manager.

    Attributes:
        done: Keys of the records that are complete, of all ranks, including those written since opening. A run with
            another number of processes therefore repeats nothing.
        recovered: One line for each file that was truncated on opening.

    Example:
        >>> with FeatureStoreWriter(root, spec, make_codec("fp16", spec.shape)) as writer:  # doctest: +SKIP
        ...     writer.write("image", 0, features)
    """

    def __init__(self, root: Path, spec: StoreSpec, codec: Codec, rank: int = 0, world: int = 1) -> None:
        """Create or open a store, and remove incomplete records of this rank.

        If the codec learns parameters, let one rank create the store before the others open it, because all ranks must
        use the same parameters.

        Args:
            root: Folder of the store. It is created if it does not exist.
            spec: Description of the features. An existing store must have the same.
            codec: Codec of ``spec.codec`` and ``spec.shape``, fitted. ``stored_codec(root)`` returns that of an
                existing store.
            rank: Rank of this process.
            world: Number of processes.

        Raises:
            UserError: The store has other settings, is damaged, or is being written by another process, or the disk
                fails.
            ValueError: ``rank`` is not below ``world``, or the codec does not fit ``spec`` or is not fitted.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        self.root, self.spec, self.codec, self.rank, self.world = Path(root), spec, codec, rank, world
        self._expired: dict[str, tuple[RankFiles, int, np.ndarray]] = {}
        self._establish()
        self.recovered: list[str] = []
        with ExitStack() as stack:
            own = RankFiles(self.root, rank)
            stack.enter_context(self._lock(rank))
            index = self._recover(own)
            for other in find_ranks(self.root):
                # Ranks of an earlier run with more processes have no writer now, so the present ranks recover them.
                if other != rank and other % world == rank:
                    with self._lock(other):
                        self._recover(RankFiles(self.root, other))
            self.done = self._durable_keys()
            with writing(self.root, f"files of rank {rank}"):
                # Records are written at offsets, so the next record overwrites what a failed append left.
                self._files = [stack.enter_context(open_records(p)) for p in (own.values, own.index, own.keys)]
                sync_folder(self.root)
            self._stack = stack.pop_all()
        self._count, self._key_end = len(index), int(index["key_end"][-1]) if len(index) else 0
        self._synced = self._count

    def _lock(self, rank: int) -> AbstractContextManager[None]:
        """Lock the files of a rank against writers in other processes."""
        return locked(self.root, "cache", f"rank{rank}.lock")

    def _establish(self) -> None:
        """Create the store, or check that an existing one has the wanted settings."""
        codec = self.codec
        make_folder(self.root)
        exists = (self.root / MANIFEST).exists()
        if exists:
            Manifest.load(self.root).require(self.root, self.spec)
        elif ranks := find_ranks(self.root):
            held = RankFiles(self.root, ranks[0]).values.name
            raise UserError(f"{self.root}: holds {held} but no {MANIFEST}; restore it or choose another folder")
        if (codec.name, codec.shape) != (self.spec.codec, self.spec.shape) or not codec.fitted:
            raise ValueError(f"codec {codec.name} of {codec.shape} is not fitted, or not the one of {self.spec}")
        wanted = Manifest(self.spec, codec.dtype, codec.record_bytes, codec.digest)
        if not exists:
            if wanted.codec_digest is not None:
                write_bytes(self.root / CODEC_STATE, pack_state(codec), sync=True)
            wanted.save(self.root)
        # Read back even if just written: if two ranks create the store with different parameters, one must fail.
        Manifest.load(self.root).require(self.root, wanted)

    def _recover(self, files: RankFiles) -> np.ndarray:
        """Truncate the files of a rank after the last complete record, and return the remaining index entries."""
        size = self.codec.record_bytes
        index = _durable(files, size)
        held, kept = files.sizes(), len(index)
        wanted = (kept * size, kept * INDEX_DTYPE.itemsize, int(index["key_end"][-1]) if kept else 0)
        if held[0] // size - kept > 2 * SYNC_RECORDS:
            raise UserError(
                f"{files.values}: holds {held[0] // size} records, but {files.index.name} and {files.keys.name} list "
                f"{kept}; restore those two, or delete the three files to cache this rank again"
            )
        paths = (files.values, files.index, files.keys)
        for path, before, after in reversed(list(zip(paths, held, wanted, strict=True))):
            if before > after:
                with writing(self.root, path.name), open_records(path) as file:
                    file.truncate(after)
                    os.fsync(file.fileno())
                self.recovered.append(f"{path.name}: {before - after} bytes cut behind record {kept}")
        return index

    def _durable_keys(self) -> set[str]:
        keys: set[str] = set()
        for rank in find_ranks(self.root):
            files = RankFiles(self.root, rank)
            keys.update(files.read_keys(_durable(files, self.codec.record_bytes)))
        return keys

    def expire(self, keys: Iterable[str]) -> None:
        """Mark records that ``write`` will replace. They leave ``done``, and stay in the store until they are replaced.

        Args:
            keys: Keys of the records. Keys without a record are ignored.

        Raises:
            ValueError: There are several processes. A record may be in the file of another rank.
        """
        wanted = self.done.intersection(keys)
        if wanted and self.world > 1:
            raise ValueError("records are renewed by a single process")
        for rank in find_ranks(self.root) if wanted else ():
            files = RankFiles(self.root, rank)
            index = _durable(files, self.codec.record_bytes)
            for row, key in enumerate(files.read_keys(index)):
                if key in wanted:
                    self._expired[key] = files, row, index[row].copy()
        self.done -= wanted

    def _renew(self, files: RankFiles, row: int, entry: np.ndarray, record: bytes) -> None:
        """Overwrite a record and its checksum.

        If the process is killed in between, the checksum does not match and the record is refused.
        """
        size = self.codec.record_bytes
        entry["crc32"] = zlib.crc32(record)
        with ExitStack() as stack:
            if files.rank != self.rank:
                stack.enter_context(self._lock(files.rank))
            for path, offset, part in (
                (files.values, row * size, record), (files.index, row * INDEX_DTYPE.itemsize, entry.tobytes()),
            ):  # fmt: skip
                file = stack.enter_context(open_records(path))
                _put(file, offset, part)
                os.fsync(file.fileno())

    def write(self, key: str, seed: int, features: Float[Tensor, "c h w"]) -> None:
        """Append a record, or replace an expired one.

        If an append fails, the record is removed completely, and the writer can continue.

        Args:
            key: Key of the record, unique in the store, without line feeds.
            seed: Seed that reproduces the augmentation, int32.
            features: Map of the codec's shape, of any float dtype, on any device.

        Raises:
            UserError: The key exists, the features are not finite or do not fit the codec, or the disk fails.
            ValueError: The seed is not an int32.
        """
        raw = encode_key(key)
        if key in self.done:
            raise UserError(f"{self.root}: {key!r} is in the store already; keys must be unique")
        if not -(2**31) <= seed < 2**31:
            raise ValueError(f"seed {seed} of {key!r} is not an int32")
        try:
            record = struct.pack("<i", seed) + self.codec.encode(features)
        except FeatureError as error:
            raise UserError(f"{self.root}: {key!r}: {error}") from None
        if key in self._expired:
            with writing(self.root, f"the record of {key!r} ({len(record)} bytes)"):
                self._renew(*self._expired.pop(key), record)
            self.done.add(key)
            return
        line = raw + b"\n"
        key_end = self._key_end + len(line)
        parts = (record, pack_entry(record, raw, key_end), line)
        offsets = self._offsets()
        with writing(self.root, f"the record of {key!r} ({sum(map(len, parts))} bytes)"):
            try:
                for file, offset, part in zip(self._files, offsets, parts, strict=True):
                    _put(file, offset, part)
            except BaseException:  # also on Ctrl-C, so that no reader finds a partial record
                for file, offset in zip(reversed(self._files), reversed(offsets), strict=True):
                    file.truncate(offset)
                raise
        self._count, self._key_end = self._count + 1, key_end
        self.done.add(key)
        if self._count - self._synced >= SYNC_RECORDS:
            self.flush()

    def _offsets(self) -> tuple[int, int, int]:
        return self._count * self.codec.record_bytes, self._count * INDEX_DTYPE.itemsize, self._key_end

    def flush(self) -> None:
        """Synchronise all written records to disk (fsync)."""
        with writing(self.root, f"the last {self._count - self._synced} records"):
            for file in self._files:
                os.fsync(file.fileno())
        self._synced = self._count

    def close(self) -> None:
        """Flush and close the files. A second call has no effect."""
        with self._stack:
            try:
                self.flush()
            finally:
                self._files = []

    def __enter__(self) -> FeatureStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _put(file: BinaryIO, offset: int, data: bytes) -> None:
    file.seek(offset)
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _durable(files: RankFiles, record_bytes: int) -> np.ndarray:
    """Return index entries of complete records, with the checksums of the last ``SYNC_RECORDS`` verified.

    Files are read without a memory map, because another rank may truncate them meanwhile.
    """
    index = files.read_index()
    values_size, _, most = files.sizes()
    index = index[: values_size // record_bytes]
    start = max(0, len(index) - SYNC_RECORDS)
    if start == len(index):
        return index
    with files.values.open("rb") as values, files.keys.open("rb") as keys:
        values.seek(start * record_bytes)
        begin = int(index["key_end"][start - 1]) if start else 0
        keys.seek(begin)
        for number in range(start, len(index)):
            end = int(index["key_end"][number])
            line = keys.read(end - begin) if begin < end <= most else b""
            record = values.read(record_bytes)
            intact = line.endswith(b"\n") and key_hash(line[:-1]) == index["key_hash"][number]
            if not intact or zlib.crc32(record) != index["crc32"][number]:
                return index[:number]
            begin = end
    return index
