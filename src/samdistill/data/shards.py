"""A folder of SA-1B's tar shards, with an index of their members that is made once.

The index has one file per shard, which is written when the shard is listed. An interrupted run and other processes
therefore keep what is finished. It holds the size and modification time of the shard, so a shard that was downloaded
again is listed again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ..dist import process_rank, world_size
from ..io import make_folder, writing
from ..names import key_problem
from ..progress import Progress
from ..reading import one_line, parse_json
from ..types import UserError
from .images import IMAGE_SUFFIXES, unread
from .members import ARCHIVES, COMPRESSED, Member, scan, state_of
from .skipped import BadInput

INDEX = ".samdistill-index"
"""Folder of the index beside the shards."""
_END, _VERSION, _AT_ONCE = ".npz", 1, 8
_HINT = "set data.index to a folder for the index that can be written"
logger = logging.getLogger("samdistill")


class _Shard(NamedTuple):
    """A shard of the folder, and the files that may hold its index. The last of them is written."""

    path: str
    name: str
    state: tuple[int, int]
    indices: tuple[Path, ...]


class _Members(NamedTuple):
    """The regular files of a shard in its order, and what is wrong with the shard."""

    stems: np.ndarray
    suffixes: np.ndarray
    ranges: Int[np.ndarray, "n 2"]
    problems: list[tuple[str, str]]


def has_shards(root: Path) -> bool:
    """Return whether a folder has tar shards or compressed archives, without sub-folders.

    Raises:
        UserError: It has extracted files too, so that some images would be there twice.
    """
    names = _names(root)
    shards = [name for name in names if name.endswith(".tar")]
    extracted = [name for name in names if name.startswith("sa_") and name.endswith((".json", *IMAGE_SUFFIXES))]
    if shards and extracted:
        raise UserError(
            f"data.root: {root} has shards ({shards[0]}) and extracted files ({extracted[0]}); move one of the two "
            "to a folder of its own"
        )
    return bool(shards) or (not extracted and any(name.endswith(ARCHIVES) for name in names))


def read_shard_list(path: Path, known: Iterable[str]) -> list[str]:
    """Read names of shards from a list of links such as ``sa-1b-10p.txt``.

    The name is the first column of a line; further columns, such as the link, are separated by white space. The heading
    ``file_name`` is not a shard.

    Args:
        path: The list.
        known: Names of the shards that are there.

    Returns:
        The names, sorted.

    Raises:
        UserError: The file cannot be read, names no shard, or names one that is not there.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.shards: cannot read {path}: {one_line(error)}") from None
    wanted = {line.split()[0] for line in lines if line.strip()} - {"file_name"}
    if not wanted:
        raise UserError(f"data.shards: {path} names no shard; write one a line, such as sa_000020.tar")
    if lacking := sorted(wanted - set(known)):
        some = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        raise UserError(
            f"data.shards: {len(lacking)} of the {len(wanted)} shards in {path} are not in data.root: {some}"
        )
    return sorted(wanted)


class ShardFiles:
    """Pairs of an image and its JSON in the shards of a folder. Nothing is extracted.

    A pair may be in two shards. Of members with one name the first is used, in the order of the shards' names.

    Args:
        root: The folder of ``.tar`` files.
        index: Folder that the index is written to. None is ``.samdistill-index`` in ``root``, which is read in any
            case.
        listed: List of links that names the shards to use. None uses all.

    Attributes:
        problems: Members and shards that cannot be used.

    Raises:
        UserError: The index cannot be written, or the list of links is wrong.
    """

    def __init__(self, root: Path, index: Path | None = None, listed: Path | None = None) -> None:
        places = tuple(dict.fromkeys([root / INDEX, index or root / INDEX]))
        names = _names(root)
        self.problems = [BadInput(name, COMPRESSED) for name in names if name.endswith(ARCHIVES)]
        there = [name for name in names if name.endswith(".tar")]
        self.problems += _vanished(places, there)
        wanted = there if listed is None else read_shard_list(listed, there)
        shards = []
        for name in wanted:
            path = root / name
            with _reading(path):
                state = state_of(path.stat())
            shards.append(_Shard(str(path), name, state, tuple(place / f"{name}{_END}" for place in places)))
        self._shards = shards
        self._pair(_members(shards))

    def _pair(self, found: list[_Members]) -> None:
        """Join the members of all shards and sort the pairs by key."""
        self.problems += [BadInput(*problem) for members in found for problem in members.problems]
        stems = np.concatenate([members.stems for members in found] or [np.zeros(0, "S1")])
        suffixes = np.concatenate([members.suffixes for members in found] or [np.zeros(0, "S1")])
        self._ranges = np.concatenate([members.ranges for members in found] or [np.zeros((0, 2), np.int64)])
        self._of = np.repeat(np.arange(len(found), dtype=np.int32), [len(members.stems) for members in found])
        self._suffixes = suffixes
        images = np.isin(suffixes, [s for s in np.unique(suffixes) if s.decode().lower() in IMAGE_SUFFIXES])
        for suffix in np.unique(suffixes[~images]):
            if reason := unread(f"_{suffix.decode()}"):
                rows = np.flatnonzero(suffixes == suffix)
                self.problems += [BadInput(self._name(stems[row], row), reason) for row in rows]
        image_rows, json_rows = self._first(stems, images), self._first(stems, suffixes == b".json")
        both, left, right = np.intersect1d(stems[image_rows], stems[json_rows], True, True)
        for rows, paired, why in (
            (image_rows, left, "image without its JSON"), (json_rows, right, "JSON without its image")
        ):  # fmt: skip
            self.problems += [BadInput(stem.decode(), why) for stem in stems[np.delete(rows, paired)]]
        self._stems, self._images, self._jsons = both, image_rows[left], json_rows[right]

    @property
    def keys(self) -> list[str]:
        """Names of the images without suffix, sorted."""
        return [stem.decode() for stem in self._stems.tolist()]

    def _first(self, stems: np.ndarray, chosen: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
        """Return the rows of the first member of each stem, sorted by stem. Others are reported."""
        rows = np.flatnonzero(chosen)
        rows = rows[np.argsort(stems[rows], kind="stable")]
        again = np.concatenate([[False], stems[rows[1:]] == stems[rows[:-1]]])[: len(rows)]
        for place in np.flatnonzero(again):
            row, before = rows[place], rows[place - 1]
            where = f"{self._shards[self._of[row]].name} repeats {self._shards[self._of[before]].name}"
            self.problems.append(BadInput(self._name(stems[row], row), f"duplicate: {where}"))
        return rows[~again]

    def _name(self, stem: bytes, row: int) -> str:
        return (stem + self._suffixes[row]).decode()

    def _member(self, key: str, rows: Int[np.ndarray, " n"]) -> Member:
        stem = key.encode()
        place = int(np.searchsorted(self._stems, stem))
        if place == len(self._stems) or self._stems[place] != stem:
            raise KeyError(key)
        row = int(rows[place])
        shard = self._shards[self._of[row]]
        offset, size = self._ranges[row].tolist()
        return Member(shard.path, shard.state, self._name(stem, row), offset, size)

    def image(self, key: str) -> Member:
        return self._member(key, self._images)

    def annotation(self, key: str) -> Member:
        return self._member(key, self._jsons)


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Name a shard that the system cannot read. Its index is not written, because the fault may pass."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; finished shards are kept, so start the command "
            "again, or leave this one out with data.shards"
        ) from error


def _names(root: Path) -> list[str]:
    """Return the names of the files in a folder that are not hidden, sorted."""
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.name[0] != "." and e.is_file())


def _vanished(places: Iterable[Path], there: Iterable[str]) -> list[BadInput]:
    """Report shards that have an index but are not in the folder."""
    indexed = {p.name.removesuffix(_END): p for place in places for p in place.glob(f"[!.]*{_END}")}
    return [
        BadInput(name, f"was indexed, but is no longer in data.root; put it back, or delete {indexed[name]}")
        for name in sorted(indexed.keys() - set(there))
    ]


def _members(shards: list[_Shard]) -> list[_Members]:
    """Read the index of every shard, and make those that are missing.

    Threads wait for the disk. Processes of a run start at different shards, so that they share the work.
    """
    found = [_read_any(shard, warn=False) for shard in shards]
    missing = [place for place, members in enumerate(found) if members is None]
    start = process_rank() * len(missing) // world_size()
    missing = missing[start:] + missing[:start]
    progress = Progress("index", len(missing), "shards", enabled=bool(missing) and process_rank() == 0)
    with progress, ThreadPoolExecutor(_AT_ONCE) as pool:
        made = pool.map(lambda place: _made(shards[place]), missing)
        for place, members in zip(missing, made, strict=True):
            found[place] = members
            progress.advance()
    return [members for members in found if members is not None]


def _read_any(shard: _Shard, warn: bool) -> _Members | None:
    found = (_read(path, shard.state, warn) for path in shard.indices)
    return next((members for members in found if members is not None), None)


def _read(path: Path, state: tuple[int, int], warn: bool) -> _Members | None:
    """Read the index of a shard. None if there is none for this state of the shard, or it is not readable.

    warn: Log that it is not readable.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if file["about"].tolist() != [_VERSION, *state]:
                return None
            problems = parse_json(file["problems"].tobytes(), list[tuple[str, str]])
            members = _Members(file["stems"], file["suffixes"], file["ranges"], problems)
            kinds = tuple((column.dtype.kind, column.shape[1:]) for column in members[:3])
            if kinds != (("S", ()), ("S", ()), ("i", (2,))) or len({len(column) for column in members[:3]}) != 1:
                raise ValueError("its columns do not fit")
            return members
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # a damaged file can raise any exception
        if warn:
            logger.warning(f"{path}: not a readable index of a shard, so it is made again: {one_line(error)}")
        return None


def _made(shard: _Shard) -> _Members:
    """List a shard and write its index, unless another process has done it by now."""
    if (there := _read_any(shard, warn=True)) is not None:
        return there
    problems = list[BadInput]()
    stems, suffixes, ranges = list[bytes](), list[bytes](), list[tuple[int, int]]()
    with _reading(shard.path):
        entries = list(scan(shard.path, shard.state[0], problems, shard.name))
    for entry in entries:
        stem, suffix = os.path.splitext(entry.name)
        if reason := key_problem(entry.name):
            problems.append(BadInput(repr(stem), reason))
        else:
            stems.append(stem.encode())
            suffixes.append(suffix.encode())
            ranges.append((entry.offset, entry.size))
    members = _Members(
        np.array(stems, "S"), np.array(suffixes, "S"), np.array(ranges, np.int64).reshape(-1, 2),
        list(dict.fromkeys(problems)),
    )  # fmt: skip
    path = shard.indices[-1]
    make_folder(path.parent, _HINT)
    with writing(path, hint=_HINT) as file:
        np.savez(
            file, about=np.array([_VERSION, *shard.state], np.int64), stems=members.stems, suffixes=members.suffixes,
            ranges=members.ranges, problems=np.frombuffer(dumps(members.problems).encode(), np.uint8),
        )  # fmt: skip
    return members
