"""Files of a store: the manifest, file names and index entries.

``manifest.json``      description of the features; written first, atomically
``codec.safetensors``  learned parameters of the codec, if any; their digest is in the manifest
``rank{r}-values.bin`` records of equal size: augmentation seed (little-endian int32), then the payload
``rank{r}-index.bin``  per record ``INDEX_DTYPE``: hash of its key, end of its key's line, CRC-32 of the record
``rank{r}-keys.txt``   one key per line, in the order of the records
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import PositiveInt
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from ..io import disk_errors, write_json
from ..reading import fits
from ..types import UserError

FORMAT, VERSION = "samdistill-features", 1
MANIFEST, CODEC_STATE = "manifest.json", "codec.safetensors"

# CRC-32 detects every burst error up to 32 bits and runs at 4 GB/s; cryptographic hashes would halve the read rate.
INDEX_DTYPE = np.dtype([("key_hash", "<u8"), ("key_end", "<u8"), ("crc32", "<u4")])


@dataclass(frozen=True)
class StoreSpec:
    """Description of the features in a store. Stores with equal descriptions are interchangeable.

    Attributes:
        tap: Teacher's name of the tensor.
        shape: Channels, height, width of one record.
        image_size: Side of the canvas in pixels.
        teacher: Fingerprint of the teacher, hexadecimal.
        transform: Fingerprint of geometry and augmentation, hexadecimal.
        codec: ``fp16``, ``fp32``, ``int8`` or ``pca{K}-int8``.

    Raises:
        ValueError: ``shape`` is not three positive numbers.
    """

    tap: str
    shape: tuple[int, int, int]
    image_size: int
    teacher: str
    transform: str
    codec: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"a record is channels x height x width, not {self.shape}")


class _Stored(TypedDict):
    """Fields of the manifest file other than format and version."""

    tap: str
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    image_size: int
    teacher: str
    transform: str
    codec: str
    dtype: str
    record_bytes: PositiveInt
    codec_digest: str | None


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``: the description of the features and the record layout of the codec."""

    spec: StoreSpec
    dtype: str
    record_bytes: int
    codec_digest: str | None

    def require(self, root: Path, wanted: Manifest | StoreSpec) -> None:
        """Check that the store at ``root`` has the wanted settings.

        Raises:
            UserError: Settings differ. The message names all of them.
        """
        if isinstance(wanted, StoreSpec):
            wanted = replace(self, spec=wanted)
        pairs = zip(self._settings().items(), wanted._settings().values(), strict=True)
        differences = [f"{name}: stored {mine}, wanted {theirs}" for (name, mine), theirs in pairs if mine != theirs]
        if differences:
            raise UserError(
                f"{root}: this store was cached with other settings: {'; '.join(differences)}; "
                "give the cache another folder, or delete this one to cache again"
            )

    def _settings(self) -> dict[str, object]:
        spec = asdict(self.spec) | {"shape": "x".join(map(str, self.spec.shape))}
        return spec | {"dtype": self.dtype, "record_bytes": self.record_bytes, "codec_digest": self.codec_digest}

    def save(self, root: Path) -> None:
        """Write the manifest atomically."""
        settings = {"format": FORMAT, "version": VERSION} | self._settings() | {"shape": list(self.spec.shape)}
        write_json(root / MANIFEST, settings, indent=2, sync=True)

    @classmethod
    def load(cls, root: Path) -> Manifest:
        """Read the manifest of the store at ``root``.

        Raises:
            UserError: There is no store, or this version cannot read it.
        """
        path = root / MANIFEST
        try:
            raw = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{root}: no feature store here ({MANIFEST} is missing); create it with `samdistill cache`"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not readable: {error}; restore it, or delete the store and cache again") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise UserError(f"{path}: not the manifest of a feature store; choose another folder")
        if raw.get("version") != VERSION:
            raise UserError(f"{path}: store format {raw.get('version')}, this program reads format {VERSION}")
        try:
            found = fits(raw, _Stored)
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); restore it, or delete the store and cache again") from None
        spec = StoreSpec(**{name: found[name] for name in StoreSpec.__dataclass_fields__})  # type: ignore[literal-required]
        return cls(spec, found["dtype"], found["record_bytes"], found["codec_digest"])


@dataclass(frozen=True)
class RankFiles:
    """The three files that one rank writes."""

    root: Path
    rank: int

    @property
    def values(self) -> Path:
        return self.root / f"rank{self.rank}-values.bin"

    @property
    def index(self) -> Path:
        return self.root / f"rank{self.rank}-index.bin"

    @property
    def keys(self) -> Path:
        return self.root / f"rank{self.rank}-keys.txt"

    def sizes(self) -> tuple[int, int, int]:
        """Return the bytes of values, index and keys; 0 for a missing file."""
        return tuple(p.stat().st_size if p.exists() else 0 for p in (self.values, self.index, self.keys))  # type: ignore[return-value]

    def read_index(self) -> np.ndarray:
        """Read the complete entries whose keys are on disk, as a structured array of ``INDEX_DTYPE``."""
        _, index_size, keys_size = self.sizes()
        if not index_size:
            return np.empty(0, INDEX_DTYPE)
        entries = np.fromfile(self.index, INDEX_DTYPE, count=index_size // INDEX_DTYPE.itemsize)
        # Only the end is removed, so that a damaged offset in the middle does not hide the valid records after it.
        there = np.flatnonzero(entries["key_end"] <= keys_size)
        return entries[: there[-1] + 1] if there.size else entries[:0]

    def read_keys(self, index: np.ndarray) -> list[str]:
        """Read the keys of the records in ``index``."""
        text, begin, keys = self.keys.read_bytes() if len(index) else b"", 0, []
        for end in index["key_end"].tolist():
            keys.append(decode_key(text[begin:end].removesuffix(b"\n")))
            begin = end
        return keys


def find_ranks(root: Path) -> list[int]:
    """Return the ranks that have files in ``root``, ascending."""
    names = (re.fullmatch(r"rank(\d+)-(?:values\.bin|index\.bin|keys\.txt)", path.name) for path in root.iterdir())
    return sorted({int(match[1]) for match in names if match})


def encode_key(key: str) -> bytes:
    """Encode a key as UTF-8, without a line end. File names that are not UTF-8 are kept (surrogateescape).

    Raises:
        UserError: The key is empty, has a line feed, or cannot be encoded.
    """
    try:
        raw = key.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise UserError(f"key {key!r} cannot be written as UTF-8; rename the file") from None
    if not raw or b"\n" in raw:
        raise UserError(f"key {key!r} is empty or spans lines; rename the file")
    return raw


def decode_key(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def key_hash(raw: bytes) -> int:
    """Return 64 bits of BLAKE2b. Two keys may have the same hash, so a look-up also compares the text."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def pack_entry(record: bytes, raw_key: bytes, key_end: int) -> bytes:
    """Return the index entry of ``record``. ``key_end`` is the offset after the line feed of its key."""
    return np.array([(key_hash(raw_key), key_end, zlib.crc32(record))], INDEX_DTYPE).tobytes()


def writing(root: Path, what: str) -> AbstractContextManager[None]:
    """Convert an operating-system error while ``what`` is written to a ``UserError``."""
    return disk_errors(root, f"at {what}; everything written before is kept: make room and run again to resume")
