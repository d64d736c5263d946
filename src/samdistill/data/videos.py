"""Video data sets with masks: the interface of a data set, exact decoding of chosen frames, and opening a data set."""

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
from .division import read_keys, split_keys, subset
from .fingerprints import combined, file_digest
from .images import one_line
from .skipped import BadInput, leave_out
from .sources import BadImage
from .transforms import Size

_UPRIGHT = (1, 0, 0, 1)


class BadVideo(BadImage):
    """A video or its annotation cannot be used. ``bad`` holds its key and the reason."""


@dataclass(frozen=True, eq=False)
class VideoRecord:
    """Description of a video that is available without decoding its frames.

    a is the number of annotated frames and n the number of objects. Row r of ``visible`` and ``labelled`` describes
    frame ``annotated[r]``.

    Attributes:
        key: Key of the video.
        height, width: Size of the upright frames and of the masks in pixels.
        frames: Number of frames.
        rate: Frames per second.
        annotated: Numbers of the frames that have masks, ascending.
        objects: Ids of the objects that are visible in at least one annotated frame.
        visible: Whether an object has a pixel in an annotated frame, (a, n).
        labelled: Whether an object was annotated in an annotated frame, (a, n). If not, it is unknown whether it is
            visible, and ``visible`` is False.
        concepts: Phrases for each object; empty if the data set has no names.
        problems: Parts of the annotation that were left out, such as an object that is visible in no frame.
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
        """Return the row of frame ``index``. Raise ``ValueError`` if it is not annotated."""
        if index not in self.annotated:
            raise ValueError(f"frame {index} of {self.key} is not annotated")
        return self.annotated.index(index)


class VideoSource(ABC):
    """Base class of video data sets. Subclasses list their keys and read videos by key.

    Listing opens no video, so a damaged video is found by ``record``.

    Attributes:
        keys: Unique keys of the videos, sorted.
        problems: Inputs that were found unusable when the data set was listed.
    """

    keys: list[str]
    problems: list[BadInput]

    @abstractmethod
    def __init__(self, root: Path) -> None:
        """List the videos in ``root``."""

    @abstractmethod
    def path(self, key: str) -> Path:
        """Return the path of the video file, or of the folder of frames."""

    @abstractmethod
    def record(self, key: str) -> VideoRecord:
        """Return the description of a video. Raise ``BadVideo`` if it is damaged or does not fit its annotation."""

    @abstractmethod
    def frames(self, key: str, indices: Sequence[int]) -> UInt8[np.ndarray, "t h w 3"]:
        """Decode frames.

        Args:
            key: Key of the video.
            indices: Frame numbers from 0, in any order, with or without repetitions.

        Returns:
            Upright RGB frames (t, h, w, 3), uint8, in the order of ``indices``.

        Raises:
            BadVideo: A frame cannot be decoded.
            IndexError: The video has no such frame.
        """

    def fingerprint(self, key: str) -> str:
        """Return 16 hexadecimal digits of the file, or of each file in the folder. Raise ``OSError`` if unreadable."""
        path = self.path(key)
        if not path.is_dir():
            return combined([file_digest(path)])
        files = sorted(file for file in path.iterdir() if file.is_file())
        return combined(os.fsencode(file.name) + file_digest(file) for file in files)

    @abstractmethod
    def masks(self, key: str, index: int) -> Bool[np.ndarray, "n h w"]:
        """Read the masks (n, h, w) of ``record(key).objects`` in an annotated frame. Hidden objects have empty masks.

        Raises:
            BadVideo: A mask is damaged.
            ValueError: The frame is not annotated.
        """


VIDEOS: Registry[type[VideoSource]] = Registry("video data set kind")


def seen_objects(
    key: str, ids: Sequence[int], visible: Bool[np.ndarray, "a m"]
) -> tuple[list[int], tuple[BadInput, ...]]:
    """Return the columns of objects that are visible in an annotated frame, and the other objects as problems.

    ``ids`` are the ids of m objects, ``visible`` (a, m) says whether each is visible in each annotated frame.
    """
    seen = visible.any(0)
    lost = tuple(
        BadInput(f"{key}, object {number}", "it appears in no annotated frame")
        for number, there in zip(ids, seen, strict=True)
        if not there
    )
    return np.flatnonzero(seen).tolist(), lost


def check_indices(key: str, indices: Sequence[int], frames: int) -> None:
    """Raise ``IndexError`` for a frame number outside 0..frames - 1."""
    for index in indices:
        if not 0 <= index < frames:
            raise IndexError(f"frame {index} of {key}, which has {frames}")


def open_videos(
    root: Path, kind: str, split: Literal["train", "held_out"], held_out_fraction: float = 0.1, fraction: float = 1.0,
    ids: Path | None = None,
) -> VideoSource:  # fmt: skip
    """Open the training videos or the videos to evaluate on. The two never overlap.

    The videos are divided by a hash of the key, so adding videos moves none of the others.

    Args:
        root: Folder of the data set.
        kind: Kind of the data set, a name in ``VIDEOS``.
        split: ``train`` or ``held_out``.
        held_out_fraction: Fraction of held-out videos. With 0 all are training videos, with 1 all are held out.
        fraction: Fraction of the training videos that is used.
        ids: Text file with one key per line, such as DAVIS's ``ImageSets/2017/val.txt`` or SA-V's ``sav_val.txt``. It
            selects videos before the division. None selects all.

    Raises:
        UserError: The root is missing or empty, the kind or an id is unknown, or one side of the division has no video.
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
    """Positions of the frames in a video file, from one pass over its packets.

    Frames are numbered in the order in which they are shown. Numbers are exact for constant and variable frame rates.

    Attributes:
        path: The file.
        size: Height and width of an upright frame.
        rate: Average number of frames per second.
        pts: Presentation timestamp of each frame in ticks of the stream, ascending.
        entry_pts, entry_dts: Presentation and decoding timestamps of the key frames, from which decoding can start.
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
        """Return the number of the last key frame that is shown no later than frame ``index``.

        Frames that are stored after a key frame but shown before it refer to the previous key frame.
        """
        return max(0, int(np.searchsorted(self.entry_pts, self.pts[index], "right")) - 1)


def scan_video(path: Path) -> VideoFile:
    """Find the frames of a video file.

    Only the first frame is decoded. An AVI with B-frames is decoded completely to verify its timestamps.

    Raises:
        UserError: The file is missing, damaged or not a video, has no frames, no timestamps or no frame rate, or has
            timestamps that do not fit its frames.
    """
    with _opened(path) as (container, stream):
        shown, entries = [], []
        for packet in container.demux(stream):
            if not packet.size:  # marks the end of the stream
                continue
            if packet.is_corrupt:
                raise ValueError("its data ends early or is damaged")
            if packet.pts is None:
                raise ValueError("its frames have no timestamps; store it as mp4")
            if packet.is_keyframe:
                entries.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
            if not packet.is_discard:
                shown.append(packet.pts)
        if not shown or not entries:
            raise ValueError("it holds no frame")
        pts = np.sort(np.array(shown, np.int64))
        if (np.diff(pts) == 0).any():
            raise ValueError("two of its frames have the same timestamp")
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
            raise ValueError("it has no frame rate; store it as mp4")
        return VideoFile(path, (height, width), float(stream.average_rate), pts, entry_pts, entry_dts)


def _require_times(container: InputContainer, stream: VideoStream, pts: Int[np.ndarray, " n"]) -> None:
    """Raise ``ValueError`` unless decoding from here gives frames with the timestamps ``pts``, in this order.

    An AVI has no timestamps. FFmpeg generates them, and with B-frames they are wrong, because frames are stored in
    another order than they are shown. Only decoding all frames reveals this.
    """
    shown = [frame.pts for frame in container.decode(stream)]
    if shown != pts.tolist():
        raise ValueError("an AVI with B-frames has no valid timestamps; convert it: ffmpeg -i a.avi a.mp4")


def read_frames(video: VideoFile, indices: Sequence[int]) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
    """Decode frames of a video file, one at a time.

    For each key frame that is needed, decoding starts there and ends at the last wanted frame.

    Args:
        video: The file.
        indices: Frame numbers from 0, in any order.

    Yields:
        Number and upright RGB pixels (h, w, 3), uint8, of each frame, once, in ascending order.

    Raises:
        UserError: A frame or one that it depends on is damaged.
        IndexError: The video has no such frame.
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
                    # either damage, or a key frame that needs earlier frames; decoding from the start needs none
                    if start == 0:
                        lost = f"frame {min(left.values())} or one that it depends on is damaged"
                        raise ValueError(lost) from error
            if left:
                raise ValueError(f"frame {min(left.values())} cannot be decoded")


def _group(
    container: InputContainer, stream: VideoStream, video: VideoFile, entry: int, left: dict[int, int]
) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
    """Decode from a key frame, yield the frames in ``left`` (timestamp to number) and remove them from it."""
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
    """Yield frames in the order in which they are shown, from a key frame, or one before it, to the end."""
    latest = int(video.entry_pts[entry])
    for time in (latest, int(video.entry_dts[entry])):  # MP4 seeks by presentation time, others by decoding time
        container.seek(time, stream=stream)
        packets = container.demux(stream)
        first = next(packets)
        if first.is_keyframe and first.pts is not None and first.pts <= latest:
            break
    for packet in chain([first], packets):
        # frames that are shown before the key frame refer to frames that were not read
        if packet.pts is None or first.pts is None or packet.pts >= first.pts:
            yield from packet.decode()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video and its first video stream. Errors in the body become ``UserError`` with the file's name."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            # by default the decoder conceals damage and returns wrong pixels
            stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = 1  # the loader's processes share the cores
            yield container, stream
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, av.FFmpegError) else one_line(error)
        raise UserError(f"{path} is not a readable video: {reason}") from error


def _pixels(frame: VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
    """Return RGB pixels with the display matrix applied. Raise ``ValueError`` for other turns than by 90 degrees."""
    # with more threads a loader worker that is forked later would wait for threads of the converter and never return
    pixels, (a, b, c, d) = frame.to_ndarray(format="rgb24", threads=1), _matrix(frame)
    # a pixel is shown at column a * column + c * row and row b * column + d * row, up to an offset
    if a and d and not b and not c:
        across, down = a, d
    elif b and c and not a and not d:
        pixels, across, down = pixels.transpose(1, 0, 2), c, b
    else:
        raise ValueError("its rotation is not a multiple of 90 degrees; store it upright")
    return np.ascontiguousarray(pixels[:: 1 if down > 0 else -1, :: 1 if across > 0 else -1])


def _matrix(frame: VideoFrame) -> tuple[int, ...]:
    """Return a, b, c and d of the display matrix, as named in ISO/IEC 14496-12."""
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return _UPRIGHT
    values = np.frombuffer(bytes(data), np.int32)
    return tuple(int(values[i]) for i in (0, 1, 3, 4))
