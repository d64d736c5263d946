"""Videos stored as folders of frames, with one id map per annotated frame (DAVIS) or a folder per object (SA-V val)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Bool, UInt8

from ..types import UserError
from .frames import list_frames
from .id_maps import VOID, found_ids, read_id_map, refuse_drawing
from .images import UnreadableImage, read_image, upright_size
from .skipped import BadInput
from .sources import key_problem, size_problem
from .transforms import Size
from .videos import VIDEOS, BadVideo, VideoRecord, VideoSource, check_indices, seen_objects

LAYOUTS = (("JPEGImages", "Annotations"), ("JPEGImages_24fps", "Annotations_6fps"))
"""Folders of frames and of masks: those of DAVIS, and those of SA-V val and test."""
RESOLUTIONS = ("480p", "Full-Resolution")
"""Sub-folders of DAVIS between those and the videos. The first that exists is used."""
RATE = 24.0
"""Frames per second of both data sets. Folders of frames do not state a rate."""
_PARSED = 256  # videos whose visible objects (not pixels) a process keeps


class _Masks(Protocol):
    """Masks of one video.

    Attributes:
        rows: Numbers of the annotated frames.
        ids: Ids of all objects.
    """

    rows: Sequence[int]
    ids: Sequence[int]

    def flags(self, size: Size) -> tuple[Bool[np.ndarray, "a m"], Bool[np.ndarray, "a m"]]:
        """Return whether each object is visible, and whether it is labelled, in each annotated frame."""

    def masks(self, index: int, ids: Sequence[int], size: Size) -> Bool[np.ndarray, "n h w"]: ...


class _IdFiles:
    """One id map per annotated frame."""

    def __init__(self, files: Mapping[int, Path], size: Size) -> None:
        self.files, self.rows = files, sorted(files)
        self._found = [_ids_in(files[row], size) for row in self.rows]
        ids = set().union(*(values for values, _ in self._found))
        # 255 marks borders if there are other ids; as the only id it is the object of a binary mask
        if len(ids) > 1 and all(dtype == np.uint8 for _, dtype in self._found):
            ids.discard(VOID)
        self.ids = sorted(ids)

    def flags(self, size: Size) -> tuple[Bool[np.ndarray, "a m"], Bool[np.ndarray, "a m"]]:
        visible = [[number in values for number in self.ids] for values, _ in self._found]
        shape = len(self.rows), len(self.ids)
        return np.array(visible, bool).reshape(shape), np.ones(shape, bool)

    def masks(self, index: int, ids: Sequence[int], size: Size) -> Bool[np.ndarray, "n h w"]:
        grid = read_id_map(self.files[index], size)
        return grid == np.array(ids, np.uint16)[:, None, None]  # the largest type of a PNG


def _ids_in(path: Path, size: Size) -> tuple[set[int], np.dtype]:
    """Return the ids in a file and the type of its values."""
    ids = read_id_map(path, size)
    refuse_drawing(path, ids)
    return set(found_ids(ids)), ids.dtype


class _ObjectFolders:
    """A folder per object with one PNG per annotated frame, in which non-zero pixels are the object."""

    def __init__(self, folders: Mapping[int, Mapping[int, Path]]) -> None:
        self.folders, self.ids = folders, sorted(folders)
        self.rows = sorted({row for files in folders.values() for row in files})

    def flags(self, size: Size) -> tuple[Bool[np.ndarray, "a m"], Bool[np.ndarray, "a m"]]:
        cells = [[self.folders[number].get(row) for number in self.ids] for row in self.rows]
        visible = [[path is not None and bool(read_id_map(path, size).any()) for path in row] for row in cells]
        shape = len(self.rows), len(self.ids)
        labelled = [[path is not None for path in row] for row in cells]
        return np.array(visible, bool).reshape(shape), np.array(labelled, bool).reshape(shape)

    def masks(self, index: int, ids: Sequence[int], size: Size) -> Bool[np.ndarray, "n h w"]:
        found = np.zeros((len(ids), *size), bool)
        for number, mask in zip(ids, found, strict=True):
            path = self.folders[number].get(index)
            if path is not None:
                mask[:] = read_id_map(path, size) != 0
        return found


@dataclass(frozen=True, eq=False)
class _Parsed:
    record: VideoRecord
    names: tuple[str, ...]
    masks: _Masks


@lru_cache(_PARSED)
def _parse(owner: object, key: str, images: Path, masks: Path) -> _Parsed:
    """List the frames of a video and read all masks once to find the visible objects.

    ``owner`` separates the cached results of different sources.
    """
    try:
        names, found = list_frames(images, key)
        size = upright_size(images / names[0])
        problems = list(found)
        frames = {Path(name).stem: number for number, name in enumerate(names)}
        where = _masks(key, masks, frames, size, problems)
        visible, labelled = where.flags(size)
    except UserError as error:
        raise BadVideo(key, str(error)) from error
    if not where.rows:
        first = f"; {problems[0].key}: {problems[0].reason}" if problems else ""
        raise BadVideo(key, f"{masks} has no mask of a frame in {images}{first}")
    kept, lost = seen_objects(key, where.ids, visible)
    record = VideoRecord(
        key, *size, len(names), RATE, tuple(where.rows), tuple(where.ids[k] for k in kept), visible[:, kept],
        labelled[:, kept], (), (*problems, *lost),
    )  # fmt: skip
    return _Parsed(record, names, where)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def _masks(key: str, folder: Path, frames: Mapping[str, int], size: Size, problems: list[BadInput]) -> _Masks:
    names = _names(folder)
    inside = [name for name in names if (folder / name).is_dir()]
    if not inside:
        return _IdFiles(_files(key, folder, names, frames, problems), size)
    if len(inside) < len(names):
        stray = min(set(names) - set(inside))
        raise UserError(f"{folder} has folders of objects, such as {inside[0]}, and a file beside them, {stray}")
    numbers = {name: int(name) for name in inside if name.isdecimal()}
    problems += [BadInput(f"{key}/{n}", "the folder's name must be a number") for n in inside if n not in numbers]
    if len(set(numbers.values())) < len(numbers):
        raise UserError(f"{folder} has two folders for the same object")
    return _ObjectFolders({
        number: _files(f"{key}/{name}", folder / name, _names(folder / name), frames, problems)
        for name, number in numbers.items()
    })  # fmt: skip


def _files(
    key: str, folder: Path, names: Sequence[str], frames: Mapping[str, int], problems: list[BadInput]
) -> dict[int, Path]:
    """Map frame numbers to mask files. A file that is not a PNG or has no frame is a problem."""
    found = {}
    for name in names:
        path = folder / name
        if path.suffix.lower() != ".png":
            problems.append(BadInput(f"{key}/{name}", "a mask has to be a PNG: other formats do not keep ids exactly"))
        elif path.stem not in frames:
            problems.append(BadInput(f"{key}/{name}", "mask without frame"))
        else:
            found[frames[path.stem]] = path
    return found


def _folders(root: Path) -> tuple[Path, Path]:
    for names in LAYOUTS:
        images, masks = (root / name for name in names)
        if images.is_dir() and masks.is_dir():
            inner = (r for r in RESOLUTIONS if (images / r).is_dir() and (masks / r).is_dir())
            resolution = next(inner, "")
            return images / resolution, masks / resolution
    raise UserError(f"{root}: neither {' nor '.join(' beside '.join(f'{n}/' for n in names) for names in LAYOUTS)}")


@VIDEOS.register("davis")
class DavisSource(VideoSource):
    """Videos in the layout of DAVIS or of SA-V val and test.

    Frames are ``JPEGImages/<key>/*.jpg``, sorted naturally (``2.jpg`` before ``10.jpg``) and numbered from 0. Gaps in
    their numbers are reported. A mask has the name of its frame. The frame rate is taken as 24 per second. There are
    two forms of masks:

    - ``Annotations/<key>/<frame>.png`` is an id map, palette or grey. 0 is background, and in 8 bits 255 is unlabelled
      if the video has other ids.
    - ``Annotations/<key>/<object>/<frame>.png`` is the mask of one object, non-zero where it is visible. Objects may
      overlap. An object is not labelled in a frame without its PNG.

    A video without masks and masks without a video are reported in ``problems``.
    """

    def __init__(self, root: Path) -> None:
        """List the videos in ``root``.

        Raises:
            UserError: The folders of frames and masks are missing.
        """
        self.images, self.masks_root = _folders(root)
        images, masks = ({p.name for p in f.iterdir() if p.name[0] != "." and p.is_dir()}
                         for f in (self.images, self.masks_root))  # fmt: skip
        self.problems = [BadInput(key, f"no masks in {self.masks_root}") for key in sorted(images - masks)]
        self.problems += [BadInput(key, f"no frames in {self.images}") for key in sorted(masks - images)]
        both = sorted(images & masks)
        self.problems += [BadInput(repr(key), reason) for key in both if (reason := key_problem(key))]
        self.keys = [key for key in both if key_problem(key) is None]
        self._owner = object()

    def path(self, key: str) -> Path:
        return self.images / key

    def _parsed(self, key: str) -> _Parsed:
        return _parse(self._owner, key, self.images / key, self.masks_root / key)

    def record(self, key: str) -> VideoRecord:
        return self._parsed(key).record

    def frames(self, key: str, indices: Sequence[int]) -> UInt8[np.ndarray, "t h w 3"]:
        parsed = self._parsed(key)
        check_indices(key, indices, parsed.record.frames)
        found = np.zeros((len(indices), *parsed.record.size, 3), np.uint8)
        for pixels, index in zip(found, indices, strict=True):
            path = self.images / key / parsed.names[index]
            try:
                image = read_image(path)
            except UnreadableImage as error:
                raise BadVideo(key, str(error)) from error
            if (image.height, image.width) != parsed.record.size:
                size = (image.height, image.width)
                raise BadVideo(key, size_problem(str(path), size, parsed.record.size, "the first frame"))
            pixels[:] = np.asarray(image)
        return found

    def masks(self, key: str, index: int) -> Bool[np.ndarray, "n h w"]:
        parsed = self._parsed(key)
        parsed.record.row(index)
        try:
            return parsed.masks.masks(index, parsed.record.objects, parsed.record.size)
        except UserError as error:
            raise BadVideo(key, str(error)) from error
