"""Track objects through videos with each kind of memory: J&F as in the DAVIS and SA-V evaluators.

Each object is given by its true mask in the first annotated frame in which it is visible. If the convention takes the
objects of the first annotated frame, only objects that are visible there are given. The phrase of an object is the last
of its names that the student can tokenise. Each video is decoded once for all sessions: one without memory, one with
the student's own and, with a teacher, one with the teacher's feature maps in place of the student's. A SAM with its own
memory has one session.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, singledispatch
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from transformers import Sam2VideoModel, Sam3TrackerVideoModel

from ..checkpoints.trackers import Tracker
from ..checkpoints.words import Phrases
from ..data.skipped import BadInput, leave_out
from ..data.transforms import Geometry
from ..data.videos import BadVideo, VideoRecord, VideoSource
from ..inference.concepts import StudentDetector
from ..inference.session import Session
from ..inference.tracker import TrackerSession
from ..inference.video import VideoSession
from ..io import scratch
from ..metrics.video import score_videos
from ..metrics.video_files import MaskFile, load_objects
from ..metrics.video_frames import VideoConvention, first_frame_objects
from ..ops.sights import MOST_OBJECTS
from ..types import ImageBatch
from .latency import device_name, parameters
from .result import Conditions
from .video_result import STUDENT, TEACHER, WITHOUT, VideoResult, video_rows

REAPPEARED_SECONDS = 0.5
"""Time after its return during which an object counts as reappeared."""
WARM_UP = 2
"""Number of frames at the start of a video that are not timed. Their memory is smaller, and the first frames of a
process include one-time costs.
"""
_READ_AT_ONCE = 32  # frames in memory at once; decoding restarts for each such part
_SHARE = "masklet_visible_share"


class Pyramids(Protocol):
    """Detector whose feature maps a memory can use.

    Its canvas is square. ``pyramid`` returns four levels per image, finest first.
    """

    @property
    def image_size(self) -> int: ...

    def pyramid(self, images: ImageBatch) -> Sequence[Float[Tensor, "b c _ _"]]: ...


@dataclass(frozen=True)
class Entrant:
    """A model that is evaluated.

    Attributes:
        network: The model, whose parameters are counted.
        image_size: Side of its canvas in pixels.
        words: What reads phrases, or None.
        stride: Video frames between two frames of the memory; 1 if every frame enters it.
        level: Feature level in the memory.
        start: Starts a session, by row of the result. Its argument is the number of pushed frames between two frames of
            the memory.
    """

    network: nn.Module
    image_size: int
    words: Phrases | None
    stride: int
    level: int
    start: Mapping[str, Callable[[int], Session]]


@singledispatch
def entrant(model: StudentDetector, contexts: Mapping[str, int | None], geometry: str) -> Entrant:
    """Return a student as an entrant, with one row for each of ``contexts``, the frames in the memory."""
    config = model.model.config

    def start(context: int | None, stride: int) -> Session:
        return VideoSession(model, context=context, stride=stride, geometry=geometry)

    rows = {name: partial(start, context) for name, context in contexts.items()}
    return Entrant(model.model, model.image_size, model.words, config.memory_stride, config.memory_level, rows)


@entrant.register(Sam2VideoModel)
@entrant.register(Sam3TrackerVideoModel)
def _tracker(model: Tracker, contexts: Mapping[str, int | None], geometry: str) -> Entrant:
    """Return a SAM with its own memory, which has the row ``STUDENT`` alone."""
    size = int(model.image_size)
    return Entrant(model, size, None, 1, 0, {STUDENT: lambda _: TrackerSession(model, geometry=geometry)})


def evaluate_videos_with(
    model: StudentDetector | Tracker,
    source: VideoSource,
    keys: Sequence[str],
    *,
    convention: VideoConvention,
    context: int | None = None,
    every_frame: bool = False,
    teacher: Pyramids | None = None,
    geometry: str = "square",
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> VideoResult:
    """Track the objects of the videos ``keys``. Return one row per memory.

    ``convention`` selects the frames and objects that count. ``context`` is the number of frames in a student's memory,
    None for the model's. With ``every_frame`` all frames are processed, else annotated ones only. Without a ``teacher``
    its row is omitted. ``geometry`` is ``square`` or ``longest_side``. ``workers`` processes score after all videos
    were tracked. ``progress`` is called with 1 after each video. Videos that cannot be used are listed in ``skipped``.

    Raise ``UserError`` if no video can be used or no object counts, and ``ValueError`` if ``context`` is below 1.
    """
    if context is not None and context < 1:
        raise ValueError(f"context must be at least 1, got {context}; the row without memory is always included")
    contexts = {WITHOUT: 0, STUDENT: context} | ({} if teacher is None else {TEACHER: context})
    entered = entrant(model, contexts, geometry)
    run = _Run(entered, source, convention, every_frame, teacher, geometry)
    skipped, files = list(source.problems), dict[str, Path]()
    with scratch() as folder, evaluating(entered.network):
        for number, key in enumerate(keys):
            try:
                followed = run.follow(key)
            except BadVideo as error:
                skipped.append(error.bad)
            else:
                files[key] = folder / f"{number}.npz"
                followed.save(files[key])
            if progress is not None:
                progress(1)
        scores = {}
        for name in entered.start:
            loads = {key: partial(load_objects, path, name) for key, path in files.items()}
            scores[name] = score_videos(loads, convention, workers)
    failures = {BadInput(failure.name, failure.error): None for each in scores.values() for failure in each.failures}
    skipped += failures
    leave_out(skipped)
    rows = video_rows(scores, run.seconds, convention, skipped)
    return VideoResult(
        rows=rows,
        teacher=None if teacher is None else TEACHER,
        convention=convention.name,
        videos=len(scores[STUDENT].videos),
        parameters=parameters(entered.network),
        conditions=_conditions(entered, run.seconds.get(STUDENT, [])),
        skipped=tuple(skipped),
        scores=scores,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode inside a ``with`` block.

    Afterwards every module has its previous mode, because modules can differ: a trained memory in a frozen model.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, before in training.items():
            module.training = before


def frames_of(source: VideoSource, key: str, indices: Sequence[int]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Read frames, with at most ``_READ_AT_ONCE`` of them in memory.

    Args:
        source: The videos.
        key: Key of the video.
        indices: Numbers of the frames, ascending.

    Raises:
        BadVideo: The video cannot be read.
    """
    for start in range(0, len(indices), _READ_AT_ONCE):
        yield from source.frames(key, indices[start : start + _READ_AT_ONCE])


def phrase_of(record: VideoRecord, column: int, words: Phrases | None) -> str | None:
    """Return the most specific name of an object that the student can tokenise, or None if there is none."""
    names = record.concepts[column] if record.concepts and words is not None else ()
    return next((name for name in reversed(names) if words is not None and words.fits(name)), None)


def visible_shares(source: VideoSource, record: VideoRecord) -> dict[int, Float[np.ndarray, " a"]]:
    """Read the visible fraction of each object in each annotated frame: visible area divided by whole area.

    Returns:
        Fractions, 0..1, by object id, of shape (a,). Empty for videos that are not rendered.
    """
    path = source.path(record.key).with_name(f"{record.key}_manual.json")
    text = path.read_bytes() if path.is_file() else b""
    if f'"{_SHARE}"'.encode() not in text:
        return {}
    stored = json.loads(text)
    ids, shares = stored["masklet_id"], np.array(stored[_SHARE], np.float64)
    return {int(number): shares[:, column] for column, number in enumerate(ids)}


@dataclass(frozen=True)
class _Run:
    """Settings that are the same for all videos.

    Attributes:
        seconds: Seconds of each timed frame by row.
    """

    model: Entrant
    source: VideoSource
    convention: VideoConvention
    every_frame: bool
    teacher: Pyramids | None
    geometry: str
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def follow(self, key: str) -> MaskFile:
        """Track the objects of one video with every memory. Raise ``BadVideo`` if it cannot be read."""
        record = self.source.record(key)
        leave_out(record.problems)
        if not record.objects:
            raise BadVideo(key, "no object to track")
        video = _Video(self, record)
        rows = {index: row for row, index in enumerate(record.annotated)}
        indices = record.annotated[video.first :]
        if self.every_frame:
            indices = tuple(range(indices[0], indices[-1] + 1))
        for number, (index, frame) in enumerate(zip(indices, frames_of(self.source, key, indices), strict=True)):
            if index not in rows:
                video.push(number, frame)
                continue
            row, truth = rows[index], self.source.masks(key, index)
            new = video.give(row, truth)
            video.keep(row, truth, video.push(number, frame, new))
        return video.masks

    def stride(self, record: VideoRecord) -> int:
        """Return the number of processed frames from one remembered frame to the next.

        If only annotated frames are processed, the distance in video frames is as close to that of training as
        possible.
        """
        wanted = self.model.stride
        if self.every_frame or len(record.annotated) < 2:
            return wanted
        return max(1, round(wanted / float(np.median(np.diff(record.annotated)))))

    def theirs(self, frame: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "c h w"] | None:
        """Return the teacher's feature map of a frame at the level that the memory uses, or None."""
        if self.teacher is None:
            return None
        place = Geometry(self.teacher.image_size, self.geometry)  # type: ignore[arg-type]
        canvas, size = place.canvas(Image.fromarray(frame))
        batch = ImageBatch(
            canvas[None], torch.tensor([size]), torch.tensor([frame.shape[:2]]), ("frame",),
            torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip
        return self.teacher.pyramid(batch)[self.model.level][0]


class _Video:
    """State of one video during tracking.

    Attributes:
        counted: Ids of the objects that are scored.
        columns: Column of the record by object id. An id that exists only by the convention has none.
        starts: Row in which each object is given, by column. It is past the last row if the object is never given.
        sessions: Sessions by row of the result. There are several if there are more objects than a session can track.
        masks: Masks so far.
    """

    def __init__(self, run: _Run, record: VideoRecord) -> None:
        """Raise ``BadVideo`` if no object can be given."""
        self.run, self.record = run, record
        self.columns = {number: column for column, number in enumerate(record.objects)}
        self.counted: Sequence[int] = record.objects
        self.starts: Int[np.ndarray, " n"] = record.visible.argmax(0)  # every object is visible in some row
        if run.convention.from_first_frame:
            shown = record.visible[0]
            if not shown.any():
                raise BadVideo(
                    record.key, f"no object in its first annotated frame, and {run.convention.name} counts no other"
                )
            self.counted = first_frame_objects(np.array(record.objects)[shown].tolist())
            self.starts = np.where(shown, 0, len(record.annotated))
        given = np.flatnonzero(self.starts < len(record.annotated)).tolist()
        self.session_of = {column: place // MOST_OBJECTS for place, column in enumerate(given)}
        self.first, self.stride = int(self.starts.min()), run.stride(record)
        self.sessions = {
            name: [start(self.stride) for _ in range(0, len(given), MOST_OBJECTS)]
            for name, start in run.model.start.items()
        }
        self.shares = visible_shares(run.source, record)
        self.masks = MaskFile(record.size, self.counted, list(self.sessions), round(record.rate * REAPPEARED_SECONDS))

    def give(self, row: int, truth: Bool[np.ndarray, "n h w"]) -> bool:
        """Give the objects that start in this row, for the next frame that is pushed. Return whether there are any."""
        columns = np.flatnonzero(self.starts == row).tolist()
        for column in columns:
            phrase = phrase_of(self.record, column, self.run.model.words)
            for sessions in self.sessions.values():
                sessions[self.session_of[column]].add_mask(truth[column], phrase, self.record.objects[column])
        return bool(columns)

    def push(
        self, number: int, frame: UInt8[np.ndarray, "h w 3"], new: bool = False
    ) -> dict[str, dict[int, Bool[np.ndarray, "h w"]]]:
        """Process the ``number``-th frame. Return the masks by row of the result and by object id."""
        # the teacher encodes only frames that a session remembers
        theirs = self.run.theirs(frame) if new or number % self.stride == 0 else None
        found: dict[str, dict[int, Bool[np.ndarray, "h w"]]] = {}
        for name, sessions in self.sessions.items():
            begun = time.perf_counter()
            extra = {} if name != TEACHER else {"remembered": theirs}
            tracked = [one for session in sessions for one in session.push(frame, **extra)]
            if number >= WARM_UP:
                self.run.seconds.setdefault(name, []).append(time.perf_counter() - begun)
            found[name] = {one.object_id: one.mask for one in tracked}
        return found

    def keep(
        self, row: int, truth: Bool[np.ndarray, "n h w"], found: Mapping[str, Mapping[int, Bool[np.ndarray, "h w"]]]
    ) -> None:
        """Store the true and predicted masks of an annotated frame.

        Only objects that are labelled in the frame and given by then are stored. An object that counts but is never
        given starts with the video and has empty predictions.
        """
        empty = np.zeros(self.record.size, bool)
        for place, number in enumerate(self.counted):
            column = self.columns.get(number)
            if column is None:  # no mask has this id, so both masks are empty
                self.masks.add(place, self.record.annotated[row], empty, dict.fromkeys(found, empty))
                continue
            start = int(self.starts[column])
            if row < start < len(self.record.annotated) or not self.record.labelled[row, column]:
                continue
            if row == start:  # the given mask is used, not the session's output
                masks = dict.fromkeys(found, truth[column])
            else:
                masks = {name: own.get(number, empty) for name, own in found.items()}
            share = float(self.shares[number][row]) if number in self.shares else None
            self.masks.add(place, self.record.annotated[row], truth[column], masks, share)


def _conditions(model: Entrant, seconds: Sequence[float]) -> Conditions | None:
    if not seconds:
        return None
    device = next(model.network.parameters()).device
    return Conditions(device_name(device), torch.get_num_threads(), len(seconds), model.image_size)
