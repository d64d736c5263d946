"""``samdistill predict`` on a video: what a phrase names or a box shows, followed from frame to frame."""

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
from ..progress import Progress
from ..types import UserError
from .concepts import Box, StudentDetector, check_prompts, load_concept_model
from .drawing import COLOURS, overlay
from .geometry import check_geometry
from .points import cornered
from .video import Tracked, VideoSession

FILES = (".mp4", ".mov", ".m4v", ".mkv", ".avi", ".webm", ".mpg", ".mpeg", ".ts")
"""Endings of videos; any other file is taken for an image."""
ENCODER = {"crf": "18", "preset": "medium"}
"""Options of libx264: close to what cannot be told from the original by eye."""
Frame = UInt8[np.ndarray, "h w 3"]


def is_video(path: Path) -> bool:
    """Whether ``path`` is to be read as a video: a folder of frames, or a file that is called like one."""
    return path.is_dir() or path.suffix.lower() in FILES


@dataclass(frozen=True)
class SeenObject:
    """A visible object in one frame. box: xyxy in pixels, around the mask."""

    object_id: int
    score: float
    box: tuple[float, float, float, float]
    rle: Rle


@dataclass(frozen=True)
class FollowedObject:
    """One object of the whole video. phrase: what it is called. first, last: frames that show it. frames: how many."""

    object_id: int
    phrase: str | None
    first: int
    last: int
    frames: int


@dataclass(frozen=True)
class VideoPrediction:
    """What was asked of a video and what was followed through it.

    frames: how many were looked at. size: height and width. rate: frames a second. context: remembered frames, 0 for a
    student without memory. seconds: spent on ``decode``, ``model`` and ``draw``, which writes too. seen: the visible
    objects of each frame. crowded: some instances of the phrase were more than a session follows. out: the video that
    was drawn, if any.
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
        """Plain values: boxes as xyxy in pixels, masks as COCO's compressed run lengths."""
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
    """A video that can be read from its start. size: height and width of a frame."""

    name: str
    size: Size
    rate: float
    count: int
    read: Callable[[int], Iterator[Frame]]


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """A frame of a followed video. number: from 0. image: (height, width, 3), uint8. objects: of the session."""

    number: int
    image: Frame
    objects: tuple[Tracked, ...]

    def draw(self) -> Image.Image:
        """The frame with the masks and ids of what is visible."""
        return Image.fromarray(draw_tracked(self.image, self.objects))


def follow(
    video: str | Path, model: str | Path | StudentDetector, text: str | None = None, boxes: Sequence[Box] = (), *,
    threshold: float = 0.5, geometry: str | None = None, frames: int | None = None,
) -> Iterator[VideoFrame]:  # fmt: skip
    """Frames and the objects in them, one by one; arguments as of ``predict_video``, which are checked at once."""
    video, boxes = as_path(video), cornered(boxes)
    _check(video, text, boxes, threshold, geometry, None, frames)
    footage = _open(video)
    session = _session(footage, model, text, boxes, threshold, geometry)
    total = footage.count if frames is None else min(frames, footage.count)
    return (
        VideoFrame(number, frame, tuple(session.push(frame))) for number, frame in enumerate(footage.read(total))
    )  # fmt: skip


def _session(
    footage: _Footage, model: str | Path | StudentDetector, text: str | None, boxes: Sequence[Box], threshold: float,
    geometry: str | None,
) -> VideoSession:  # fmt: skip
    """A session that was told what to follow."""
    asked = load_concept_model(model, device=default_device()) if isinstance(model, str | Path) else model
    if not isinstance(asked, StudentDetector):
        raise UserError(f"{model}: a SAM 3 teacher has no memory here; give a run of the video job or a student")
    check_prompts(asked.words, text, boxes, footage.size)
    session = VideoSession(asked, threshold=threshold, geometry=geometry)
    if boxes:
        for box in boxes:
            session.add_box(box, text)
    elif text is not None:
        session.add_text(text)
    return session


@reporting("predict")
def predict_video(
    video: str | Path, model: str | Path | StudentDetector, text: str | None = None, boxes: Sequence[Box] = (), *,
    threshold: float = 0.5, geometry: str | None = None, out: str | Path | None = None, frames: int | None = None,
    progress: bool = True,
) -> VideoPrediction:  # fmt: skip
    """Follow every instance of what ``text`` names, also those that come later; or the object in each of ``boxes`` in
    the first frame, which ``text`` then is the name of.

    video: a file, or a folder of frames in the natural order of their names (24 a second, as DAVIS). model: a run
    of the video job, any other student's folder, which goes without memory, or an opened one. boxes: xyxy in pixels,
    upright. threshold: least score of what is visible. geometry: square or longest_side; None takes the model's own.
    out: an MP4 to draw masks and ids into; it is there when it is whole. frames: look at so many at most.
    Raises ``UserError`` for what cannot be asked, read or written.
    """
    video, out, boxes = as_path(video), None if out is None else as_path(out), cornered(boxes)
    _check(video, text, boxes, threshold, geometry, out, frames)
    footage = _open(video)
    session = _session(footage, model, text, boxes, threshold, geometry)
    total = footage.count if frames is None else min(frames, footage.count)
    seconds, seen, objects = _run(session, footage, total, out, progress)
    return VideoPrediction(
        footage.name, text, tuple(boxes), total, footage.size, footage.rate, session.context, seconds, objects, seen,
        session.crowded, out,
    )  # fmt: skip


def _check(
    video: Path, text: str | None, boxes: Sequence[Box], threshold: float, geometry: str | None, out: Path | None,
    frames: int | None,
) -> None:  # fmt: skip
    """What can be refused before anything is opened."""
    if text is None and not boxes:
        raise UserError("nothing is asked: give --text, --box or both")
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold: {threshold:g} is not between 0 and 1")
    if geometry is not None:
        check_geometry(geometry)
    if frames is not None and frames < 1:
        raise UserError(f"--frames: {frames} is not 1 or more")
    if out is not None and out.suffix.lower() != ".mp4":
        raise UserError(f"--out: {out} does not end in .mp4")
    if out is not None:
        check_output(out, video)
    if not video.exists():
        raise UserError(f"{video}: no such video")


def _run(
    session: VideoSession, footage: _Footage, total: int, out: Path | None, progress: bool
) -> tuple[dict[str, float], tuple[tuple[SeenObject, ...], ...], tuple[FollowedObject, ...]]:
    """Seconds by what they were spent on, the visible objects of each frame, and all objects."""
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
    """A copy of ``frame`` with the mask of every visible object and its id.

    objects: all that are followed, in the order they came, so that one keeps its colour whichever others are visible.
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
    """Takes the frames of an MP4 that is there when it is whole: they go into a partial file beside it, which an error
    removes. An odd side is made even by its last row or column, once more."""
    height, width = size
    with replacing(path) as new, av.open(str(new), "w", format="mp4", options={"movflags": "faststart"}) as container:
        # 24000/1001 and the like have come as a float
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001), options=ENCODER)
        # colour at half resolution, which every player reads, needs even sides
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        container.start_encoding()  # what cannot be written shows now, and not after a minute of frames

        def add(picture: Frame) -> None:
            even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            # in one thread, since loader workers may be forked after this; see data/videos.py
            shown = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(format="yuv420p", threads=1)
            container.mux(stream.encode(shown))

        yield add
        container.mux(stream.encode(None))


def _open(video: Path) -> _Footage:
    """Raises ``UserError`` for what holds no frames."""
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
