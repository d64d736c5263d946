"""SA-V: one ``sav_<id>.mp4`` per video with JSON files of run-length masks for every fourth frame."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from pycocotools import mask as coco_mask

from ..reading import Table, parse_json
from ..types import UserError
from .coco import decode_segmentation
from .skipped import BadInput
from .sources import key_problem, size_problem
from .transforms import Size
from .videos import (
    VIDEOS,
    BadVideo,
    VideoFile,
    VideoRecord,
    VideoSource,
    check_indices,
    read_frames,
    scan_video,
    seen_objects,
)

STRIDE = 4
"""Distance of annotated frames, used only if several strides fit: 6 of SA-V's 24 frames per second are annotated."""
KINDS = ("manual", "auto")
_PARSED = 16  # videos whose run lengths (not pixels) a process keeps
_RUNS = re.compile("[0-o]*[0-O]")  # numbers in digits of 5 bits; 32 is added to all digits but the last


@dataclass(frozen=True, eq=False)
class Masklets:
    """One JSON of SA-V: run-length masks of m objects in the annotated frames.

    Attributes:
        path: The file.
        video: Id of the video.
        frames: Number of frames of the video.
        size: Height and width of the masks.
        ids: Ids of the objects.
        rles: One mask per object for each annotated frame.
        concepts: Phrases for each object (``masklet_concepts``, an extension that SA-V does not have), or empty.
    """

    path: Path
    video: str
    frames: int
    size: Size
    ids: tuple[int, ...]
    rles: tuple[tuple[dict[str, Any], ...], ...]
    concepts: tuple[tuple[str, ...], ...] = ()

    @property
    def visible(self) -> Bool[np.ndarray, "a m"]:
        """Whether each object has a pixel in each annotated frame, (a, m)."""
        flags = [[_has_pixels(rle) for rle in row] for row in self.rles]
        return np.array(flags, bool).reshape(len(self.rles), len(self.ids))

    def mask(self, row: int, column: int) -> Bool[np.ndarray, "h w"]:
        """Decode the mask of object ``column`` in annotated frame ``row``.

        Raises:
            UserError: The run lengths do not fill the frame.
        """
        try:
            return decode_segmentation(self.rles[row][column], *self.size)
        except (ValueError, TypeError) as error:
            where = f"object {self.ids[column]} in annotated frame {row}"
            raise UserError(f"{self.path}: {where}: {error}") from error


def read_masklets(path: Path) -> Masklets:
    """Parse a ``_manual.json`` or ``_auto.json``.

    Raises:
        UserError: The file is not in SA-V's format, or its masks have another size than the video that it describes.
    """
    try:
        record = parse_json(path.read_bytes(), Table)
        size = _whole(record, "video_height"), _whole(record, "video_width")
        ids = tuple(int(number) for number in record["masklet_id"])
        if len(set(ids)) < len(ids):
            raise ValueError("two objects have the same id")
        rles = tuple(_row(row, number, ids, size) for number, row in enumerate(record["masklet"]))
        concepts = tuple(tuple(_phrases(p)) for p in record.get("masklet_concepts", []))
        if concepts and len(concepts) != len(ids):
            raise ValueError(f"{len(concepts)} lists of concepts for {len(ids)} objects")
        return Masklets(path, str(record["video_id"]), _whole(record, "video_frame_count"), size, ids, rles, concepts)
    except KeyError as error:
        raise UserError(f"{path} is not a readable SA-V annotation: it has no {error}") from error
    except Exception as error:  # invalid values can raise any exception
        raise UserError(f"{path} is not a readable SA-V annotation: {' '.join(str(error).split())}") from error


def _whole(record: dict[str, Any], name: str) -> int:
    """Return a positive whole number. SA-V stores counts as floats, such as 483.0."""
    number = record[name]
    if isinstance(number, bool) or not isinstance(number, int | float) or number != int(number) or number < 1:
        raise ValueError(f"{name} is {number!r}, not a positive whole number")
    return int(number)


def _row(row: Any, number: int, ids: Sequence[int], size: Size) -> tuple[dict[str, Any], ...]:
    if not isinstance(row, list) or len(row) != len(ids):
        raise ValueError(f"annotated frame {number} needs one mask for each of {len(ids)} objects")
    for rle, identity in zip(row, ids, strict=True):
        where = f"object {identity} in annotated frame {number}"
        if not isinstance(rle, dict) or {"size", "counts"} - rle.keys():
            raise ValueError(f"{where} is not a run-length mask")
        if tuple(int(s) for s in rle["size"]) != size:
            height, width = rle["size"]
            raise ValueError(f"{where} is {width} x {height} pixels, the video {size[1]} x {size[0]}")
        counts = rle["counts"]
        # pycocotools reads beyond the end of a string that ends inside a number
        if not (_RUNS.fullmatch(counts) if isinstance(counts, str) else _are_lengths(counts)):
            raise ValueError(f"{where}: its run lengths are damaged")
    return tuple(row)


def _are_lengths(counts: Any) -> bool:
    return isinstance(counts, list) and all(isinstance(number, int | float) for number in counts)


def _phrases(listed: Any) -> list[str]:
    if not isinstance(listed, list) or not all(isinstance(phrase, str) for phrase in listed):
        raise ValueError("masklet_concepts needs one list of texts for each object")
    return listed


def _has_pixels(rle: dict[str, Any]) -> bool:
    counts = rle["counts"]
    if isinstance(counts, list):
        return any(counts[1::2])
    return bool(coco_mask.area({"size": [int(s) for s in rle["size"]], "counts": counts}))


def annotated_frames(frames: int, count: int) -> tuple[int, ...]:
    """Return the numbers of the annotated frames: from 0 at a constant stride that reaches the end of the video.

    Args:
        frames: Number of frames of the video.
        count: Number of annotated frames.

    Raises:
        ValueError: No stride gives ``count`` frames, or several do and SA-V's is not among them.

    Example:
        >>> annotated_frames(9, 3)
        (0, 4, 8)
    """
    if not 1 <= count <= frames:
        raise ValueError(f"{count} annotated frames for a video of {frames}")
    if count == 1:
        return (0,)
    least, most = -(-frames // count), (frames - 1) // (count - 1)
    if least > most:
        raise ValueError(f"{count} annotated frames lie at no regular stride in a video of {frames}")
    if least < most and not least <= STRIDE <= most:
        raise ValueError(f"{count} annotated frames of {frames} may be every {least}th or every {most}th")
    return tuple(range(0, frames, least if least == most else STRIDE))


@dataclass(frozen=True, eq=False)
class _Parsed:
    """A parsed video.

    Attributes:
        record: Description of the video.
        file: Positions of the frames.
        columns: For each object of the record, its file and its column in the file.
    """

    record: VideoRecord
    file: VideoFile
    columns: tuple[tuple[Masklets, int], ...]


@lru_cache(_PARSED)
def _parse(owner: object, key: str, video: Path, annotations: tuple[Path, ...]) -> _Parsed:
    """Read the JSON files and the packets of a video and check that they belong together.

    ``owner`` separates the cached results of different sources.
    """
    try:
        masklets = [read_masklets(path) for path in annotations]
        for part in masklets:
            if part.video != key:
                raise UserError(f"{part.path} belongs to another video, {part.video}")
            if len(part.rles) != len(masklets[0].rles):
                counts = f"{len(part.rles)} annotated frames, {masklets[0].path.name} {len(masklets[0].rles)}"
                raise UserError(f"{part.path} has {counts}")
        file = scan_video(video)
        for part in masklets:
            if part.size != file.size:
                raise UserError(size_problem(str(part.path), part.size, file.size, video.name))
            if part.frames != len(file):
                raise UserError(f"{part.path} is for {part.frames} frames, {video.name} has {len(file)}")
        annotated = annotated_frames(len(file), len(masklets[0].rles))
    except (UserError, ValueError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{annotations[0]}: {error}"
        raise BadVideo(key, reason) from error
    ids = list(masklets[0].ids)
    for part in masklets[1:]:  # the ids of each file start at 0
        ids += [number + max(ids, default=-1) + 1 for number in part.ids]
    visible = np.concatenate([part.visible for part in masklets], 1)
    kept, lost = seen_objects(key, ids, visible)
    columns = list(chain.from_iterable([(part, column) for column in range(len(part.ids))] for part in masklets))
    named = [part.concepts or ((),) * len(part.ids) for part in masklets]
    concepts = list(chain.from_iterable(named)) if any(part.concepts for part in masklets) else []
    record = VideoRecord(
        key, *file.size, len(file), file.rate, annotated, tuple(ids[k] for k in kept), visible[:, kept],
        np.ones((len(annotated), len(kept)), bool), tuple(concepts[k] for k in kept if concepts), lost,
    )  # fmt: skip
    return _Parsed(record, file, tuple(columns[k] for k in kept))


@VIDEOS.register("sav")
class SavSource(VideoSource):
    """SA-V videos: MP4 files with JSON files of run-length masks.

    The files are ``<key>.mp4`` with ``<key>_manual.json``, ``<key>_auto.json`` or both, in ``root`` or its sub-folders.
    With both, the manually annotated objects come first with their own ids, and the ids of the others continue after
    them. The stride of the annotated frames is derived from their number. A video without JSON, a JSON without video
    and a second video of the same name are reported in ``problems``. Each process keeps the run lengths of the last 16
    videos.
    """

    def __init__(self, root: Path) -> None:
        videos: dict[str, Path] = {}
        found: dict[Path, None] = {}
        self.problems = []
        for folder, below, names in os.walk(root):
            below.sort()
            for name in sorted(name for name in names if name[0] != "."):
                path = Path(folder, name)
                key = path.stem
                if name.endswith(tuple(f"_{kind}.json" for kind in KINDS)):
                    found[path] = None
                elif path.suffix.lower() != ".mp4":
                    continue
                elif reason := key_problem(key):
                    self.problems.append(BadInput(repr(key), reason))
                elif key in videos:
                    self.problems.append(BadInput(key, f"{path} has the same name as {videos[key]}"))
                else:
                    videos[key] = path
        self._parts: dict[str, tuple[Path, tuple[Path, ...]]] = {}
        for key, video in videos.items():
            own = tuple(path for kind in KINDS if (path := video.with_name(f"{key}_{kind}.json")) in found)
            if own:
                self._parts[key] = video, own
            else:
                self.problems.append(BadInput(key, f"{video} has no {key}_manual.json or {key}_auto.json beside it"))
        used = {path for _, own in self._parts.values() for path in own}
        for path in found.keys() - used:
            key = re.sub(f"_({'|'.join(KINDS)})$", "", path.stem)
            self.problems.append(BadInput(path.stem, f"{path} has no video {key}.mp4 beside it"))
        self.problems.sort()
        self.keys = sorted(self._parts)
        self._owner = object()

    def path(self, key: str) -> Path:
        return self._parts[key][0]

    def _parsed(self, key: str) -> _Parsed:
        return _parse(self._owner, key, *self._parts[key])

    def record(self, key: str) -> VideoRecord:
        return self._parsed(key).record

    def frames(self, key: str, indices: Sequence[int]) -> UInt8[np.ndarray, "t h w 3"]:
        parsed = self._parsed(key)
        check_indices(key, indices, len(parsed.file))
        try:
            pixels = dict(read_frames(parsed.file, indices))
        except UserError as error:
            raise BadVideo(key, str(error)) from error
        return np.stack([pixels[i] for i in indices]) if indices else np.zeros((0, *parsed.file.size, 3), np.uint8)

    def masks(self, key: str, index: int) -> Bool[np.ndarray, "n h w"]:
        parsed = self._parsed(key)
        row = parsed.record.row(index)
        try:
            found = [part.mask(row, column) for part, column in parsed.columns]
        except UserError as error:
            raise BadVideo(key, str(error)) from error
        return np.stack(found) if found else np.zeros((0, *parsed.file.size), bool)
