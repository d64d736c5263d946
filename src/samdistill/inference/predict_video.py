"""Prediction on videos: objects given by a phrase or by boxes, tracked from frame to frame."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from ..data.davis import RATE
from ..data.frames import list_frames
from ..data.images import read_image, upright_size
from ..data.saco import Rle, to_rle
from ..data.skipped import leave_out, reporting
from ..data.transforms import Size
from ..data.videos import read_frames, scan_video
from ..dist import default_device
from ..io import as_path, check_output, replacing
from ..ops.sights import Tracked
from ..progress import Progress
from ..types import UserError
from .concepts import Box, check_boxes
from .drawing import COLOURS, overlay
from .geometry import check_geometry
from .points import Point, cornered, labelled
from .session import Session
from .sessions import VideoModel, open_video_model, start_session

FILES = (".mp4", ".mov", ".m4v", ".mkv", ".avi", ".webm", ".mpg", ".mpeg", ".ts")
"""Extensions of video files. Any other file is read as an image."""
ENCODER = {"crf": "18", "preset": "medium"}
"""Options of libx264. This quality is close to visually lossless."""
Frame = UInt8[np.ndarray, "h w 3"]


def is_video(path: Path) -> bool:
    """Whether ``path`` is read as a video: a folder of frames, or a file with an extension in ``FILES``."""
    return path.is_dir() or path.suffix.lower() in FILES


@dataclass(frozen=True)
class SeenObject:
    """A visible object in one frame, with its box (xyxy, pixels, tight around the mask) and run-length encoded mask."""

    object_id: int
    score: float
    box: tuple[float, float, float, float]
    rle: Rle


@dataclass(frozen=True)
class FollowedObject:
    """An object over the whole video.

    Attributes:
        object_id: Its id in the session.
        phrase: The phrase that it was found or named with, or None.
        first: Number of the first frame in which it is visible.
        last: Number of the last frame in which it is visible.
        frames: Number of frames in which it is visible.
    """

    object_id: int
    phrase: str | None
    first: int
    last: int
    frames: int


@dataclass(frozen=True)
class VideoPrediction:
    """Prompts and tracked objects of a video.

    Attributes:
        video: Path of the video.
        text: The phrase that was given, or None.
        boxes: The boxes that were given, (left, top, right, bottom) in pixels of the first frame.
        frames: Number of frames that were processed.
        size: Height and width of a frame.
        rate: Frames per second.
        context: Frames that the memory holds; 0 for a student without memory.
        seconds: Time spent on ``decode``, ``model`` and ``draw``. ``draw`` includes encoding the drawn video.
        objects: The objects that were visible in at least one frame.
        seen: The visible objects of each frame.
        crowded: Whether instances were left out because a session tracks a limited number of objects.
        out: The drawn video, or None.
    """

    video: str
    text: str | None
    boxes: tuple[Box, ...]
    frames: int
    size: Size
    rate: float
    context: int
    seconds: dict[str, float]
    objects: tuple[FollowedObject, ...]
    seen: tuple[tuple[SeenObject, ...], ...]
    crowded: bool
    out: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Return values for JSON: boxes as xyxy in pixels, masks as COCO's compressed run-length encoding."""
        height, width = self.size
        return {
            "video": self.video, "text": self.text, "boxes": [list(box) for box in self.boxes], "frames": self.frames,
            "width": width, "height": height, "rate": self.rate, "context": self.context,
            "seconds": dict(self.seconds), "crowded": self.crowded, "out": None if self.out is None else str(self.out),
            "objects": [
                {"id": one.object_id, "phrase": one.phrase, "first": one.first, "last": one.last, "frames": one.frames}
                for one in self.objects
            ],
            "instances": [
                [{"id": s.object_id, "score": s.score, "box": list(s.box), "segmentation": s.rle} for s in frame]
                for frame in self.seen
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class _Footage:
    """A video that is read from its start: ``size`` is (height, width), ``read(n)`` yields the first n frames."""

    name: str
    size: Size
    rate: float
    count: int
    read: Callable[[int], Iterator[Frame]]


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """A frame of a tracked video.

    Attributes:
        number: Number of the frame, from 0.
        image: RGB frame (height, width, 3), uint8.
        objects: All objects of the session, including those that are not visible in this frame.
    """

    number: int
    image: Frame
    objects: tuple[Tracked, ...]

    def draw(self) -> Image.Image:
        """Return the frame with the masks and ids of the visible objects drawn on it."""
        return Image.fromarray(draw_tracked(self.image, self.objects))


def follow(
    video: str | Path, model: str | Path | VideoModel, text: str | None = None, boxes: Sequence[Box] = (), *,
    points: Sequence[Point | tuple[float, float]] = (), threshold: float = 0.5, geometry: str | None = None,
    frames: int | None = None,
) -> Iterator[VideoFrame]:  # fmt: skip
    """Track objects through a video and yield each frame with its objects.

    The arguments are those of ``predict_video``. They are checked when the function is called, not at the first frame.
    """
    video, boxes, points = as_path(video), cornered(boxes), labelled(points)
    _check(video, text, boxes, points, threshold, geometry, None, frames)
    footage = _open(video)
    session = _session(footage, model, text, boxes, points, threshold, geometry)
    total = footage.count if frames is None else min(frames, footage.count)
    return (
        VideoFrame(number, frame, tuple(session.push(frame))) for number, frame in enumerate(footage.read(total))
    )  # fmt: skip


def _session(
    footage: _Footage, model: str | Path | VideoModel, text: str | None, boxes: Sequence[Box], points: Sequence[Point],
    threshold: float, geometry: str | None,
) -> Session:  # fmt: skip
    """Start a session with the given prompts."""
    alone = not boxes and not points
    if isinstance(model, str | Path):
        model = open_video_model(model, worded=alone, device=default_device())
    session = start_session(model, threshold, geometry)
    check_boxes(boxes, footage.size)
    for box in boxes:
        session.add_box(box, text)
    if points:
        session.add_points(points, text)
    if alone and text is not None:
        session.add_text(text)
    return session


@reporting("predict")
def predict_video(
    video: str | Path, model: str | Path | VideoModel, text: str | None = None, boxes: Sequence[Box] = (), *,
    points: Sequence[Point | tuple[float, float]] = (), threshold: float = 0.5, geometry: str | None = None,
    out: str | Path | None = None, frames: int | None = None, progress: bool = True,
) -> VideoPrediction:  # fmt: skip
    """Track objects through a video.

    Without ``boxes``, every instance of ``text`` is tracked, including instances that appear later. With ``boxes``, the
    object in each box of the first frame is tracked, and ``text`` names these objects.

    Args:
        video: A video file, or a folder of frames in the natural order of their names (24 frames per second).
        model: A run of the video job, the folder of another detection student (used without memory), a SAM 2 or SAM 3
            with its own memory (a folder of a ``Sam2VideoModel``, ``Sam3TrackerVideoModel`` or ``Sam3VideoModel``), or
            an opened model.
        text: A noun phrase. Of the models with a SAM's memory only a ``Sam3VideoModel`` tracks what it names.
        boxes: Boxes (left, top, right, bottom) in pixels of the upright first frame.
        points: Points (x, y) or (x, y, label) on one object of the first frame, for a SAM's memory.
        threshold: Minimum score of a visible object, in 0..1.
        geometry: ``square`` or ``longest_side``; None uses the geometry saved with the model.
        out: MP4 file for the video with masks and ids drawn on it. It is created when it is complete.
        frames: Maximum number of frames.
        progress: Show a progress bar.

    Returns:
        The objects, their masks and scores in each frame, and the time spent.

    Raises:
        UserError: The prompts do not fit the model or the video, the video or the model cannot be read, or ``out``
            cannot be written.

    Example:
        >>> tracked = samdistill.predict_video("film.mp4", "sandbox-student", text="circle", frames=2, progress=False)
        >>> tracked.frames, tracked.size
        (2, (126, 126))
    """
    video, out = as_path(video), None if out is None else as_path(out)
    boxes, points = cornered(boxes), labelled(points)
    _check(video, text, boxes, points, threshold, geometry, out, frames)
    footage = _open(video)
    session = _session(footage, model, text, boxes, points, threshold, geometry)
    total = footage.count if frames is None else min(frames, footage.count)
    seconds, seen, objects = _run(session, footage, total, out, progress)
    return VideoPrediction(
        footage.name, text, tuple(boxes), total, footage.size, footage.rate, session.context, seconds, objects, seen,
        session.crowded, out,
    )  # fmt: skip


def _check(
    video: Path, text: str | None, boxes: Sequence[Box], points: Sequence[Point], threshold: float,
    geometry: str | None, out: Path | None, frames: int | None,
) -> None:  # fmt: skip
    """Check the arguments that can be checked before the video and the model are opened."""
    if text is None and not boxes and not points:
        raise UserError("no prompt given: give --text, --box or both")
    if boxes and points:
        raise UserError("--point and --box cannot be combined for a video: one of them gives the objects")
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold: {threshold:g} is not between 0 and 1")
    if geometry is not None:
        check_geometry(geometry)
    if frames is not None and frames < 1:
        raise UserError(f"--frames must be at least 1, got {frames}")
    if out is not None and out.suffix.lower() != ".mp4":
        raise UserError(f"--out: {out} does not end in .mp4")
    if out is not None:
        check_output(out, video)
    if not video.exists():
        raise UserError(f"{video}: no such video")


def _run(
    session: Session, footage: _Footage, total: int, out: Path | None, progress: bool
) -> tuple[dict[str, float], tuple[tuple[SeenObject, ...], ...], tuple[FollowedObject, ...]]:
    """Return seconds by activity, the visible objects of each frame, and all objects that were visible."""
    seconds, seen = dict.fromkeys(("decode", "model", "draw"), 0.0), list[tuple[SeenObject, ...]]()
    objects: dict[int, FollowedObject] = {}
    frames = footage.read(total)
    with ExitStack() as stack:
        film = None if out is None else stack.enter_context(_film(out, footage.size, footage.rate))
        bar = stack.enter_context(Progress("predicting", total, "frames", progress))
        for number in range(total):
            with _timed(seconds, "decode"):
                frame = next(frames)
            with _timed(seconds, "model"):
                found = session.push(frame)
            with _timed(seconds, "draw"):
                seen.append(tuple(SeenObject(o.object_id, o.score, o.box, to_rle(o.mask)) for o in found if o.visible))
                if film is not None:
                    film(draw_tracked(frame, found))
            for one in found:
                if one.visible:
                    before = objects.get(one.object_id, FollowedObject(one.object_id, one.phrase, number, number, 0))
                    objects[one.object_id] = FollowedObject(
                        one.object_id, one.phrase, before.first, number, before.frames + 1
                    )  # fmt: skip
            bar.advance()
        with _timed(seconds, "draw"):
            stack.close()
    return seconds, tuple(seen), tuple(objects.values())


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - start


def draw_tracked(frame: Frame, objects: Sequence[Tracked]) -> Frame:
    """Return a copy of ``frame`` with the mask and id of every visible object.

    ``objects`` are all objects of the session in the order in which they were added, so that an object has the same
    colour in every frame.
    """
    height, width = frame.shape[:2]
    shown = [(place % len(COLOURS), one) for place, one in enumerate(objects) if one.visible]
    masks = np.zeros((1 + max((colour for colour, _ in shown), default=-1), height, width), bool)
    for colour, one in shown:
        masks[colour] |= one.mask
    picture = Image.fromarray(overlay(frame, torch.from_numpy(masks)))
    pen, size = ImageDraw.Draw(picture), max(12, round(min(height, width) / 18))
    font = ImageFont.load_default(size)
    for _, one in shown:
        left, top, right, bottom = one.box
        x, y = np.clip(((left + right) / 2, (top + bottom) / 2), size, (width - size, height - size)).tolist()
        pen.text(
            (x, y), str(one.object_id), "white", font, anchor="mm", stroke_width=max(1, size // 10), stroke_fill="black"
        )  # fmt: skip
    return np.asarray(picture)


@contextmanager
def _film(path: Path, size: Size, rate: float) -> Iterator[Callable[[Frame], None]]:
    """Open an MP4 for writing, and yield a function that appends a frame.

    Frames are written to a temporary file beside ``path``, which gets its name when it is complete and is removed on an
    error. If a side is odd, its last row or column is repeated.
    """
    height, width = size
    with replacing(path) as new, av.open(str(new), "w", format="mp4", options={"movflags": "faststart"}) as container:
        # `rate` is a float, so rates such as 24000/1001 are converted back to a fraction
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001), options=ENCODER)
        # yuv420p, which every player supports, has chroma at half resolution and needs even sides
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        container.start_encoding()  # a file that cannot be written fails here and not after many frames

        def add(picture: Frame) -> None:
            even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            # one thread, because loader workers may be forked after this; see data/videos.py
            shown = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(format="yuv420p", threads=1)
            container.mux(stream.encode(shown))

        yield add
        container.mux(stream.encode(None))


def _open(video: Path) -> _Footage:
    """Open a video file or a folder of frames. Raises ``UserError`` if it has no frames."""
    if video.is_dir():
        return _open_folder(video)
    file = scan_video(video)
    return _Footage(
        str(video), file.size, file.rate, len(file),
        lambda count: (pixels for _, pixels in read_frames(file, range(count))),
    )  # fmt: skip


def _open_folder(folder: Path) -> _Footage:
    names, problems = list_frames(folder, str(folder))
    leave_out(problems)
    paths = [folder / name for name in names]
    size = upright_size(paths[0])

    def read(count: int) -> Iterator[Frame]:
        for number, path in enumerate(paths[:count]):
            image = read_image(path)
            if (image.height, image.width) != size:
                raise UserError(
                    f"{path}: frame {number} is {image.width} x {image.height} pixels, the first {size[1]} x {size[0]}"
                )
            yield np.asarray(image)

    return _Footage(str(folder), size, RATE, len(paths), read)
