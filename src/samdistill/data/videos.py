"""Videos with masks: the interface of a set of them, chosen frames decoded exactly, and how a set is opened."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import Bool, Int, UInt8

from ..registry import Registry
from ..types import UserError
from .fingerprints import combined, file_digest
from .images import one_line
from .skipped import BadInput, leave_out
from .sources import BadImage, read_keys, split_keys, subset
from .transforms import Size

_UPRIGHT = (1, 0, 0, 1)


class BadVideo(BadImage):
    """One video, or its annotation, cannot be used."""


@dataclass(frozen=True, eq=False)
class VideoRecord:
    """What is known of a video before a frame is decoded.

    height, width: of its upright frames and of its masks. frames: how many it has. rate: frames a second. annotated:
    numbers of the frames that have masks, ascending; a is how many, and row r stands for frame ``annotated[r]``.
    objects: ids of the n objects that are visible in one of them. visible: whether an object has a pixel in a row.
    labelled: whether anybody looked; an object that is not labelled in a row is neither visible nor known to be hidden.
    concepts: what each object is called, in phrases; empty where the set has no names. problems: parts of the
    annotation that were left out, such as an object that appears nowhere.
    """

    key: str
    height: int
    width: int
    frames: int
    rate: float
    annotated: tuple[int, ...]
    objects: tuple[int, ...]
    visible: Bool[np.ndarray, "a n"]
    labelled: Bool[np.ndarray, "a n"]
    concepts: tuple[tuple[str, ...], ...] = ()
    problems: tuple[BadInput, ...] = ()

    @property
    def size(self) -> Size:
        return self.height, self.width

    def row(self, index: int) -> int:
        """The row of frame ``index``. Raises ``ValueError`` where that frame has no masks."""
        if index not in self.annotated:
            raise ValueError(f"frame {index} of {self.key} is not annotated")
        return self.annotated.index(index)


class VideoSource(ABC):
    """A set of videos with unique keys and the masks of their objects.

    keys: sorted. problems: what listing found unusable. Listing opens no video; a broken one is found by its record.
    """

    keys: list[str]
    problems: list[BadInput]

    @abstractmethod
    def __init__(self, root: Path) -> None:
        """List ``root``."""

    @abstractmethod
    def path(self, key: str) -> Path:
        """The video's file, or the folder of its frames."""

    @abstractmethod
    def record(self, key: str) -> VideoRecord:
        """What is known of a video. Raises ``BadVideo`` for one that is broken or does not fit its annotation."""

    @abstractmethod
    def frames(self, key: str, indices: Sequence[int]) -> UInt8[np.ndarray, "t h w 3"]:
        """RGB frames in the order of ``indices`` (from 0, any order, repeats allowed), upright.

        Raises ``BadVideo`` where one cannot be decoded and ``IndexError`` for a number that the video does not reach.
        """

    def fingerprint(self, key: str) -> str:
        """16 hex digits over what the video's file, or each file in its folder, holds. Raises ``OSError``."""
        path = self.path(key)
        if not path.is_dir():
            return combined([file_digest(path)])
        files = sorted(file for file in path.iterdir() if file.is_file())
        return combined(os.fsencode(file.name) + file_digest(file) for file in files)

    @abstractmethod
    def masks(self, key: str, index: int) -> Bool[np.ndarray, "n h w"]:
        """Masks of ``record(key).objects`` in frame ``index``; empty where an object is invisible.

        Raises ``BadVideo`` for a broken mask and ``ValueError`` for a frame that is not annotated.
        """


VIDEOS: Registry[type[VideoSource]] = Registry("video data set kind")


def seen_objects(
    key: str, ids: Sequence[int], visible: Bool[np.ndarray, "a m"]
) -> tuple[list[int], tuple[BadInput, ...]]:
    """Columns of the objects that are visible in some row, and the others by name."""
    seen = visible.any(0)
    lost = tuple(
        BadInput(f"{key}, object {number}", "it appears in no annotated frame")
        for number, there in zip(ids, seen, strict=True)
        if not there
    )
    return np.flatnonzero(seen).tolist(), lost


def check_indices(key: str, indices: Sequence[int], frames: int) -> None:
    """Raises ``IndexError`` for a frame number outside 0..frames - 1."""
    for index in indices:
        if not 0 <= index < frames:
            raise IndexError(f"frame {index} of {key}, which has {frames}")


def open_videos(
    root: Path, kind: str, split: Literal["train", "held_out"], held_out_fraction: float = 0.1, fraction: float = 1.0,
    ids: Path | None = None,
) -> VideoSource:  # fmt: skip
    """The videos to train on, or those to evaluate on; the two never overlap.

    They are divided by a hash of the key, so more videos move none; ``held_out_fraction`` 0 gives all to training and 1
    all to evaluation. ``ids`` is a text file with one key a line, such as DAVIS' ``ImageSets/2017/val.txt`` or SA-V's
    ``sav_val.txt``, and chooses before the division; ``fraction`` thins the training videos alone.
    Raises ``UserError`` for a missing or empty root, an unknown kind or id, and a division with an empty side.
    """
    if not root.is_dir():
        raise UserError(f"data.root: {root} is not a folder")
    source = VIDEOS.get(kind)(root)
    if not source.keys:
        left_out = f"; {len(source.problems)} inputs were unusable" if source.problems else ""
        first = f", first {source.problems[0].key}: {source.problems[0].reason}" if source.problems else ""
        raise UserError(f"{root}: no video for data.kind={kind}{left_out}{first}")
    leave_out(source.problems, seen_by_all=True)
    if ids is not None:
        source.keys = read_keys(ids, source.keys)
    train, held_out = split_keys(source.keys, held_out_fraction)
    source.keys = train if split == "train" else held_out
    if not source.keys:
        raise UserError(f"{root}: {len(train) + len(held_out)} videos with data.held_out_fraction="
                        f"{held_out_fraction:g} leave none for {split}")  # fmt: skip
    if split == "train":
        source.keys = subset(source.keys, fraction)
    return source


@dataclass(frozen=True, eq=False)
class VideoFile:
    """Where the frames of a video file are, from one pass over its packets: frame i is the i-th that is shown.

    size: height and width of an upright frame. rate: frames a second, on average. pts: when each frame is shown, in
    ticks of the stream, ascending; so numbers are exact whether or not the rate is constant. entry_pts, entry_dts: when
    the key frames, from which decoding can start, are shown and decoded.
    """

    path: Path
    size: Size
    rate: float
    pts: Int[np.ndarray, " n"]
    entry_pts: Int[np.ndarray, " k"]
    entry_dts: Int[np.ndarray, " k"]

    def __len__(self) -> int:
        return len(self.pts)

    def entry(self, index: int) -> int:
        """The last key frame that is shown no later than frame ``index``.

        Frames that are shown before a key frame but stored after it belong to the one before, which they refer to.
        """
        return max(0, int(np.searchsorted(self.entry_pts, self.pts[index], "right")) - 1)


def scan_video(path: Path) -> VideoFile:
    """Find the frames of a video file; only the first is decoded, of an AVI with B-frames all.

    Raises ``UserError`` for a missing file, one that is no video, has no picture or no times, or times that do not fit
    its frames, or ends early.
    """
    with _opened(path) as (container, stream):
        shown, entries = [], []
        for packet in container.demux(stream):
            if not packet.size:  # the end
                continue
            if packet.is_corrupt:
                raise ValueError("its data ends early or is damaged")
            if packet.pts is None:
                raise ValueError("its frames have no times; store it as mp4")
            if packet.is_keyframe:
                entries.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
            if not packet.is_discard:
                shown.append(packet.pts)
        if not shown or not entries:
            raise ValueError("it holds no frame")
        pts = np.sort(np.array(shown, np.int64))
        if (np.diff(pts) == 0).any():
            raise ValueError("two of its frames have the same time")
        entry_pts, entry_dts = np.array(sorted(entries), np.int64).T
        container.seek(int(entry_dts[0]), stream=stream)
        first = next(container.decode(stream), None)
        if first is None:
            raise ValueError("its first frame cannot be decoded")
        if container.format.name == "avi" and stream.codec_context.codec.reorder:
            container.seek(int(entry_dts[0]), stream=stream)
            _require_times(container, stream, pts)
        height, width = _pixels(first).shape[:2]
        if not stream.average_rate:
            raise ValueError("its frames have no rate; store it as mp4")
        return VideoFile(path, (height, width), float(stream.average_rate), pts, entry_pts, entry_dts)


def _require_times(container: InputContainer, stream: VideoStream, pts: Int[np.ndarray, " n"]) -> None:
    """``ValueError`` unless the frames come out of the decoder, from here on, at the times ``pts`` one after the other.

    An AVI has no times of its own. Where frames are stored in another order than they are shown (B-frames), the times
    that FFmpeg makes up belong to other frames, which only decoding all of them tells.
    """
    shown = [frame.pts for frame in container.decode(stream)]
    if shown != pts.tolist():
        raise ValueError(
            "an AVI with B-frames does not say when its frames are shown; convert it: ffmpeg -i a.avi a.mp4"
        )


def read_frames(video: VideoFile, indices: Sequence[int]) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
    """Number and RGB pixels, upright, of each frame asked for, once and ascending, one in memory at a time.

    Decoding starts at the key frame before each group of frames and ends at the last one wanted.
    Raises ``UserError`` where a frame, or one that it depends on, is damaged, and ``IndexError`` beyond the end.
    """
    wanted = sorted(set(indices))
    check_indices(str(video.path), wanted, len(video))
    with _opened(video.path) as (container, stream):
        for entry, numbers in groupby(wanted, video.entry):
            left = {int(video.pts[number]): number for number in numbers}
            for start in sorted({entry, 0}, reverse=True):
                try:
                    yield from _group(container, stream, video, start, left)
                except av.FFmpegError as error:
                    # damage, or a file whose later key frames need what came before: the start needs nothing
                    if start == 0:
                        lost = f"frame {min(left.values())} or one that it depends on is damaged"
                        raise ValueError(lost) from error
            if left:
                raise ValueError(f"frame {min(left.values())} does not come out of the decoder")


def _group(
    container: InputContainer, stream: VideoStream, video: VideoFile, entry: int, left: dict[int, int]
) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
    """Number and pixels of the frames in ``left`` (time to number), which empties, decoded from one key frame on."""
    if left:
        for frame in _decoded(container, stream, video, entry):
            number = left.pop(frame.pts, None)
            if number is not None:
                pixels = _pixels(frame)
                if pixels.shape[:2] != video.size:
                    raise ValueError(f"frame {number} has another size than the first")
                yield number, pixels
            if not left:
                break


def _decoded(container: InputContainer, stream: VideoStream, video: VideoFile, entry: int) -> Iterator[VideoFrame]:
    """Frames as they are shown, from a key frame or one before it on."""
    latest = int(video.entry_pts[entry])
    for time in (latest, int(video.entry_dts[entry])):  # mp4 finds what is shown then, other formats what is decoded
        container.seek(time, stream=stream)
        packets = container.demux(stream)
        first = next(packets)
        if first.is_keyframe and first.pts is not None and first.pts <= latest:
            break
    for packet in chain([first], packets):
        # what is shown before the key frame refers to frames that were not read
        if packet.pts is None or first.pts is None or packet.pts >= first.pts:
            yield from packet.decode()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video's container and its first video stream; what goes wrong inside names the file."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it has no picture")
            stream = container.streams.video[0]
            # a decoder left to itself hides damage, and so hands out pixels that belong to no frame
            stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = 1  # the loader's processes share the cores
            yield container, stream
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, av.FFmpegError) else one_line(error)
        raise UserError(f"{path} is not a readable video: {reason}") from error


def _pixels(frame: VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
    """RGB, turned and mirrored as the file's display matrix asks. Raises ``ValueError`` for one that does more."""
    # one thread: the converter's own outlive it, and a loader worker that is forked then waits for them for ever
    pixels, (a, b, c, d) = frame.to_ndarray(format="rgb24", threads=1), _matrix(frame)
    # the column and row where a pixel is shown are a * column + c * row and b * column + d * row, up to a shift
    if a and d and not b and not c:
        across, down = a, d
    elif b and c and not a and not d:
        pixels, across, down = pixels.transpose(1, 0, 2), c, b
    else:
        raise ValueError("it is to be shown turned by no multiple of 90 degrees; store it upright")
    return np.ascontiguousarray(pixels[:: 1 if down > 0 else -1, :: 1 if across > 0 else -1])


def _matrix(frame: VideoFrame) -> tuple[int, ...]:
    """The linear part of the display matrix, a, b, c and d in the terms of ISO 14496-12."""
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return _UPRIGHT
    values = np.frombuffer(bytes(data), np.int32)
    return tuple(int(values[i]) for i in (0, 1, 3, 4))
