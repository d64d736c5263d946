"""A student that follows objects through videos, with each kind of memory side by side: J&F as DAVIS and SA-V do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.words import Words
from ..data.skipped import BadInput, leave_out
from ..data.transforms import Geometry
from ..data.videos import BadVideo, VideoRecord, VideoSource
from ..inference.concepts import StudentDetector
from ..inference.video import MOST_OBJECTS, VideoSession
from ..io import scratch
from ..metrics.video import evaluate_videos
from ..metrics.video_files import MaskFile, load_objects
from ..metrics.video_frames import VideoConvention, first_frame_objects
from ..types import ImageBatch
from .latency import device_name, parameters
from .result import Conditions
from .video_result import STUDENT, TEACHER, WITHOUT, VideoResult, video_rows

REAPPEARED_SECONDS = 0.5
"""For so long after its return an object counts as reappeared."""
WARM_UP = 2
"""First frames of a video that are not timed: they remember less, and the very first wake the machine."""
_READ_AT_ONCE = 32  # frames of a video in memory; decoding starts anew for each such piece
_SHARE = "masklet_visible_share"


class Pyramids(Protocol):
    """A detector whose maps can be remembered: four levels per image, finest first, from its own square canvas."""

    @property
    def image_size(self) -> int: ...

    def pyramid(self, images: ImageBatch) -> Sequence[Float[Tensor, "b c _ _"]]: ...


def evaluate_videos_with(
    model: StudentDetector,
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
    """Follow the objects of the videos ``keys``, each given by its true mask in the first frame that shows it.

    Where the rules say that objects are those of the first annotated frame, only what is visible there is given.

    Every video is decoded once, for a session without memory, one with the student's own and, with a ``teacher``, one
    that remembers its maps in place of the student's. Only annotated frames are pushed, unless ``every_frame``; context
    counts remembered frames, None takes the model's. An object goes by the last of its names that the student can read.
    workers: processes that score, after all videos were followed. progress: called with 1 after each video.

    A video that cannot be used is skipped and listed. Raises ``UserError`` where none is left, or no object counts.
    """
    if context is not None and context < 1:
        raise ValueError(f"a memory of {context} frames is none, which has its own row")
    contexts = {WITHOUT: 0, STUDENT: context} | ({} if teacher is None else {TEACHER: context})
    run = _Run(model, source, convention, contexts, every_frame, teacher, geometry)
    skipped, files = list(source.problems), dict[str, Path]()
    with scratch() as folder, evaluating(model.model):
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
        for name in contexts:
            loads = {key: partial(load_objects, path, name) for key, path in files.items()}
            scores[name] = evaluate_videos(loads, convention, workers)
    failures = {BadInput(failure.name, failure.error): None for each in scores.values() for failure in each.failures}
    skipped += failures
    leave_out(skipped)
    rows = video_rows(scores, run.seconds, convention, skipped)
    return VideoResult(
        rows=rows,
        teacher=None if teacher is None else TEACHER,
        convention=convention.name,
        videos=len(scores[STUDENT].videos),
        parameters=parameters(model.model),
        conditions=_conditions(model, run.seconds.get(STUDENT, [])),
        skipped=tuple(skipped),
        scores=scores,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every part is in the mode that it was in, since a memory may train in a frozen model."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, before in training.items():
            module.training = before


def frames_of(source: VideoSource, key: str, indices: Sequence[int]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The frames ``indices``, ascending, with a few of them in memory. Raises ``BadVideo`` as the source does."""
    for start in range(0, len(indices), _READ_AT_ONCE):
        yield from source.frames(key, indices[start : start + _READ_AT_ONCE])


def phrase_of(record: VideoRecord, column: int, words: Words) -> str | None:
    """The most specific name of an object that the student can read; None where the data has none."""
    names = record.concepts[column] if record.concepts else ()
    return next((name for name in reversed(names) if words.fits(name)), None)


def visible_shares(source: VideoSource, record: VideoRecord) -> dict[int, Float[np.ndarray, " a"]]:
    """By object, its visible area over its whole area in each annotated frame; of rendered videos alone, else empty."""
    path = source.path(record.key).with_name(f"{record.key}_manual.json")
    text = path.read_bytes() if path.is_file() else b""
    if f'"{_SHARE}"'.encode() not in text:
        return {}
    stored = json.loads(text)
    ids, shares = stored["masklet_id"], np.array(stored[_SHARE], np.float64)
    return {int(number): shares[:, column] for column, number in enumerate(ids)}


@dataclass(frozen=True)
class _Run:
    """What all videos have in common. contexts: remembered frames by row. seconds: of each push that is timed."""

    model: StudentDetector
    source: VideoSource
    convention: VideoConvention
    contexts: Mapping[str, int | None]
    every_frame: bool
    teacher: Pyramids | None
    geometry: str
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def follow(self, key: str) -> MaskFile:
        """Everybody's masks of the objects of one video. Raises ``BadVideo`` where it cannot be read."""
        record = self.source.record(key)
        leave_out(record.problems)
        if not record.objects:
            raise BadVideo(key, "no object to follow")
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
        """Pushed frames from one remembered one to the next: as near to the training's as the annotations allow."""
        wanted = int(self.model.model.config.memory_stride)
        if self.every_frame or len(record.annotated) < 2:
            return wanted
        return max(1, round(wanted / float(np.median(np.diff(record.annotated)))))

    def theirs(self, frame: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "c h w"] | None:
        """The teacher's map of a frame at the level that is remembered."""
        if self.teacher is None:
            return None
        place = Geometry(self.teacher.image_size, self.geometry)  # type: ignore[arg-type]
        canvas, size = place.canvas(Image.fromarray(frame))
        batch = ImageBatch(
            canvas[None], torch.tensor([size]), torch.tensor([frame.shape[:2]]), ("frame",),
            torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip
        return self.teacher.pyramid(batch)[self.model.model.config.memory_level][0]


class _Video:
    """One video while it is followed.

    counted: ids that are scored. columns: of the record, by id; an id that only the rules know has none. starts: by
    column, the row in which the object is given; past the end where it never is. sessions: by row of the result, as
    many as the given objects need: a session has a limit. masks: what came of it so far.
    """

    def __init__(self, run: _Run, record: VideoRecord) -> None:
        """Raises ``BadVideo`` where no object can be given."""
        self.run, self.record = run, record
        self.columns = {number: column for column, number in enumerate(record.objects)}
        self.counted: Sequence[int] = record.objects
        self.starts: Int[np.ndarray, " n"] = record.visible.argmax(0)  # every object is visible in some row
        if run.convention.from_first_frame:
            shown = record.visible[0]
            if not shown.any():
                raise BadVideo(
                    record.key, f"no object in its first annotated frame; {run.convention.name} has no other"
                )
            self.counted = first_frame_objects(np.array(record.objects)[shown].tolist())
            self.starts = np.where(shown, 0, len(record.annotated))
        given = np.flatnonzero(self.starts < len(record.annotated)).tolist()
        self.session_of = {column: place // MOST_OBJECTS for place, column in enumerate(given)}
        self.first, self.stride = int(self.starts.min()), run.stride(record)
        self.sessions = {
            name: [
                VideoSession(run.model, context=context, stride=self.stride, geometry=run.geometry)
                for _ in range(0, len(given), MOST_OBJECTS)
            ]
            for name, context in run.contexts.items()
        }
        self.shares = visible_shares(run.source, record)
        self.masks = MaskFile(record.size, self.counted, list(self.sessions), round(record.rate * REAPPEARED_SECONDS))

    def give(self, row: int, truth: Bool[np.ndarray, "n h w"]) -> bool:
        """The objects that come in this row, for the frame that is pushed next; whether there are any."""
        columns = np.flatnonzero(self.starts == row).tolist()
        for column in columns:
            phrase = phrase_of(self.record, column, self.run.model.words)
            for sessions in self.sessions.values():
                sessions[self.session_of[column]].add_mask(truth[column], phrase, self.record.objects[column])
        return bool(columns)

    def push(
        self, number: int, frame: UInt8[np.ndarray, "h w 3"], new: bool = False
    ) -> dict[str, dict[int, Bool[np.ndarray, "h w"]]]:
        """By row of the result and object, the mask in this frame, the ``number``-th."""
        # a session remembers these frames and no other; a teacher is not asked for nothing
        theirs = self.run.theirs(frame) if new or number % self.stride == 0 else None
        found: dict[str, dict[int, Bool[np.ndarray, "h w"]]] = {}
        for name, sessions in self.sessions.items():
            begun = time.perf_counter()
            tracked = [one for s in sessions for one in s.push(frame, theirs if name == TEACHER else None)]
            if number >= WARM_UP:
                self.run.seconds.setdefault(name, []).append(time.perf_counter() - begun)
            found[name] = {one.object_id: one.mask for one in tracked}
        return found

    def keep(
        self, row: int, truth: Bool[np.ndarray, "n h w"], found: Mapping[str, Mapping[int, Bool[np.ndarray, "h w"]]]
    ) -> None:
        """One frame of every object that is labelled in it, from the frame on in which the object was given.

        An object that counts and is never given begins with the video, and nothing is predicted for it.
        """
        empty = np.zeros(self.record.size, bool)
        for place, number in enumerate(self.counted):
            column = self.columns.get(number)
            if column is None:  # no mask has this id: there is nothing to find
                self.masks.add(place, self.record.annotated[row], empty, dict.fromkeys(found, empty))
                continue
            start = int(self.starts[column])
            if row < start < len(self.record.annotated) or not self.record.labelled[row, column]:
                continue
            if row == start:  # what was given, whatever a session makes of it
                masks = dict.fromkeys(found, truth[column])
            else:
                masks = {name: own.get(number, empty) for name, own in found.items()}
            share = float(self.shares[number][row]) if number in self.shares else None
            self.masks.add(place, self.record.annotated[row], truth[column], masks, share)


def _conditions(model: StudentDetector, seconds: Sequence[float]) -> Conditions | None:
    if not seconds:
        return None
    device = next(model.model.parameters()).device
    return Conditions(device_name(device), torch.get_num_threads(), len(seconds), model.image_size)
