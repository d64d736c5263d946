"""Video object segmentation metrics: region similarity J, boundary accuracy F and their mean J&F.

Details that the papers leave open follow davisvideochallenge/davis2017-evaluation (``davis2017/metrics.py``), which the
SA-V evaluator of facebookresearch/sam2 shares. This is an independent implementation. The SA-V evaluator multiplies by
100; here every figure lies in 0..1. ``video_frames`` defines which frames count. This file does not import torch,
because worker processes import it.

Source:
    Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation, CVPR 2016.
    Pont-Tuset et al., The 2017 DAVIS Challenge on Video Object Segmentation, 2017 (arXiv 1704.00675).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ..errors import UserError
from .video_frames import VideoConvention

BOUND_TH = 0.008
"""Tolerance of the boundary measure, as a share of the image diagonal."""


def _check(predicted: np.ndarray, truth: np.ndarray, axes: int) -> None:
    if predicted.shape != truth.shape or predicted.ndim != axes:
        raise ValueError(
            f"masks must have the same shape and {axes} axes: predicted {predicted.shape}, truth {truth.shape}"
        )
    if predicted.dtype != np.bool_ or truth.dtype != np.bool_:
        raise ValueError(f"masks must be bool arrays: predicted is {predicted.dtype}, truth {truth.dtype}")


def region_similarity(predicted: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """Region similarity J: intersection over union of two masks, in 0..1. It is 1 if both are empty.

    Raises:
        ValueError: The masks differ in shape, or are not 2-D bool arrays.
    """
    _check(predicted, truth, 2)
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def boundary(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Return the boundary pixels of a mask: those that differ from their east, south or south-east neighbour.

    Pixels outside the image are not neighbours. An object cut off by the image border has no boundary there, and a mask
    that covers the whole image has no boundary at all.
    """
    edge = np.zeros_like(mask)
    edge[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    edge[:-1] |= mask[:-1] ^ mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edge


def boundary_tolerance(height: int, width: int, bound_th: float = BOUND_TH) -> int:
    """Largest distance of matching boundaries: a share of the image diagonal, rounded up. 8 pixels for 480 x 854."""
    return math.ceil(bound_th * math.sqrt(height * height + width * width))


def _near(points: Bool[np.ndarray, "h w"], others: Bool[np.ndarray, "h w"], radius: int) -> int:
    """Number of ``points`` with one of ``others`` at most ``radius`` away: |points & dilation of others by a disk|.

    The disk is scikit-image's: all offsets with dx² + dy² <= radius². Each row of the disk is a run of pixels, which
    contains one of ``others`` if their cumulative sum grows over the run. The result equals that of a dilation exactly,
    and the disk is evaluated at the points only.
    """
    sums = np.pad(others, ((radius, radius), (radius + 1, radius))).cumsum(1, dtype=np.int32)
    rows, columns = np.nonzero(points)
    near = np.zeros(len(rows), dtype=np.bool_)
    for dy in range(-radius, radius + 1):
        half, line = math.isqrt(radius * radius - dy * dy), rows + (radius + dy)
        near |= sums[line, columns + (radius + half + 1)] > sums[line, columns + (radius - half)]
    return int(np.count_nonzero(near))


def boundary_f(predicted: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"], bound_th: float = BOUND_TH) -> float:
    """Boundary accuracy F: harmonic mean of precision and recall of the boundary within a tolerance, in 0..1.

    Precision is the share of the predicted boundary near the true one. Recall is the share of the true boundary near
    the predicted one. F is 1 if both boundaries are empty and 0 if one is.

    Args:
        predicted: Predicted mask.
        truth: Ground truth.
        bound_th: Tolerance as a share of the image diagonal, see ``boundary_tolerance``.

    Raises:
        ValueError: The masks differ in shape, or are not 2-D bool arrays.
    """
    _check(predicted, truth, 2)
    found, wanted = boundary(predicted), boundary(truth)
    found_pixels, wanted_pixels = np.count_nonzero(found), np.count_nonzero(wanted)
    if not found_pixels or not wanted_pixels:
        return float(found_pixels == wanted_pixels)
    radius = boundary_tolerance(*truth.shape, bound_th)
    either = found | wanted  # only the bounding box of both boundaries is searched, since most objects are small
    rows, columns = np.flatnonzero(either.any(1)), np.flatnonzero(either.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    precision = _near(found[box], wanted[box], radius) / found_pixels
    recall = _near(wanted[box], found[box], radius) / wanted_pixels
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@dataclass(frozen=True, eq=False)
class ObjectMasks:
    """Ground truth and predicted masks of one object on its annotated frames.

    Args:
        object_id: Id of the object.
        frames: Frame numbers in the video, ascending.
        truth: True masks, one per frame, empty where the object is not visible.
        predicted: Predicted masks, one per frame.
        flags: Named subsets of the frames for separate figures, see ``visibility_flags``.

    Raises:
        ValueError: Sizes or lengths differ, masks are not bool, or frames are not in ascending order.
    """

    object_id: int
    frames: Sequence[int]
    truth: Bool[np.ndarray, "t h w"]
    predicted: Bool[np.ndarray, "t h w"]
    flags: Mapping[str, Bool[np.ndarray, " t"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.predicted, self.truth, 3)
        for name, values in {"frames": self.frames, **self.flags}.items():
            if len(values) != len(self.truth):
                raise ValueError(
                    f"object {self.object_id}: {len(values)} values of {name} for masks of shape {self.truth.shape}"
                )
        if any(b <= a for a, b in zip(self.frames, self.frames[1:], strict=False)):
            raise ValueError(f"object {self.object_id}: `frames` must be ascending, got {list(self.frames)}")


@dataclass(frozen=True)
class ObjectScores:
    """J and F of one object on the frames that count. There are no frames if the object does not count.

    Attributes:
        object_id: Id of the object.
        frames: Frame numbers in the video.
        j, f: J and F per frame, in 0..1.
        flags: Per flag, whether each frame has it.
    """

    object_id: int
    frames: tuple[int, ...]
    j: tuple[float, ...]
    f: tuple[float, ...]
    flags: Mapping[str, tuple[bool, ...]]

    def summary(self, flag: str | None = None) -> dict[str, float]:
        """Return ``j`` and ``f`` (means over frames), ``jf`` (their mean) and ``frames`` (number of frames).

        Args:
            flag: Only frames with this flag count. None counts all. The result is empty if no frame counts.
        """
        if flag is None:
            kept = np.ones(len(self.frames), dtype=np.bool_)
        else:
            kept = np.array(self.flags.get(flag, (False,) * len(self.frames)), dtype=np.bool_)
        if not kept.any():
            return {}
        j, f = float(np.array(self.j)[kept].mean()), float(np.array(self.f)[kept].mean())
        return {"j": j, "f": f, "jf": (j + f) / 2, "frames": float(kept.sum())}

    def statistics(self) -> dict[str, float]:
        """Return the further statistics of DAVIS. The result is empty if there are no frames.

        ``j_recall`` is the share of frames with J above 0.5. ``j_decay`` is the mean J of the first quarter of the
        frames minus that of the last. ``f_recall`` and ``f_decay`` are the same for F.
        """
        if not self.frames:
            return {}
        measured = {"j": np.array(self.j), "f": np.array(self.f)}
        recalls = {f"{name}_recall": float((values > 0.5).mean()) for name, values in measured.items()}
        return recalls | {f"{name}_decay": _decay(values) for name, values in measured.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the figures over all frames and over the frames of each flag, without the values per frame."""
        groups = {flag: self.summary(flag) for flag in self.flags}
        return {"object_id": self.object_id, "overall": self.summary(), "groups": groups}


def _decay(values: Float[np.ndarray, " n"]) -> float:
    """Mean of the first quarter minus that of the last. As in the official evaluator, quarters share their borders."""
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    return float(values[: ends[1] + 1].mean() - values[ends[3] :].mean())


def _mean_of_objects(objects: Iterable[ObjectScores], flag: str | None) -> dict[str, float]:
    """Mean over objects with equal weights, whatever their number of frames. Objects without frames are left out."""
    figures = [figure for figure in (scores.summary(flag) for scores in objects) if figure]
    if not figures:
        return {}
    j, f = (float(np.mean([figure[name] for figure in figures])) for name in ("j", "f"))
    frames = sum(figure["frames"] for figure in figures)
    return {"j": j, "f": f, "jf": (j + f) / 2, "frames": frames, "objects": float(len(figures))}


@dataclass(frozen=True)
class VideoScores:
    """Scores of the objects of one video, in the order of the input."""

    name: str
    objects: tuple[ObjectScores, ...]

    def summary(self, flag: str | None = None) -> dict[str, float]:
        """Return the figures of the video.

        ``j``, ``f`` and ``jf`` are means over the objects' means. ``frames`` is the number of (object, frame) pairs,
        ``objects`` the number of objects.

        Args:
            flag: Only frames with this flag count, and only objects with such a frame. None counts all. The result is
                empty if no frame counts.
        """
        return _mean_of_objects(self.objects, flag)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of the video and of each object. ``not_scored`` lists objects that do not count by id."""
        scored = [scores.to_dict() for scores in self.objects if scores.frames]
        left_out = [scores.object_id for scores in self.objects if not scores.frames]
        return {"name": self.name, "overall": self.summary(), "objects": scored, "not_scored": left_out}


@dataclass(frozen=True)
class VideoFailure:
    """A video that could not be evaluated.

    Attributes:
        name: Name of the video.
        error: Message of a ``UserError``, or type and message of another error.
    """

    name: str
    error: str


@dataclass(frozen=True)
class VideoSetScores:
    """Scores of many videos under one convention, in the order of the input. Failed videos are listed separately."""

    convention: str
    videos: tuple[VideoScores, ...]
    failures: tuple[VideoFailure, ...]

    @property
    def flags(self) -> list[str]:
        """The flags of all objects, sorted. A flag is listed even if no frame has it."""
        return sorted({flag for video in self.videos for scores in video.objects for flag in scores.flags})

    def summary(self, flag: str | None = None) -> dict[str, float]:
        """Return the figures of ``VideoScores.summary`` over the objects of all videos.

        Every object has the same weight, not every video, as in the evaluators of DAVIS 2017 and SA-V.
        """
        return _mean_of_objects((scores for video in self.videos for scores in video.objects), flag)

    def statistics(self) -> dict[str, float]:
        """Return the means of ``ObjectScores.statistics`` over the objects of all videos. Empty without frames."""
        each = [found for video in self.videos for scores in video.objects if (found := scores.statistics())]
        return {name: float(np.mean([found[name] for found in each])) for name in each[0]} if each else {}

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary: figures overall, per flag, per video and per object, and failures."""
        return {
            "convention": self.convention,
            "overall": self.summary(),
            "statistics": self.statistics(),
            "groups": {flag: self.summary(flag) for flag in self.flags},
            "videos": [video.to_dict() for video in self.videos],
            "failures": [asdict(failure) for failure in self.failures],
        }


def evaluate_object(masks: ObjectMasks, convention: VideoConvention) -> ObjectScores:
    """Compute J and F on every frame of the object that counts under ``convention``."""
    counted: Int[np.ndarray, " n"] = convention.counted(masks.truth.any((1, 2)), masks.predicted.any((1, 2)))
    pairs = [(masks.predicted[index], masks.truth[index]) for index in counted]
    return ObjectScores(
        object_id=masks.object_id,
        frames=tuple(int(masks.frames[index]) for index in counted),
        j=tuple(region_similarity(predicted, truth) for predicted, truth in pairs),
        f=tuple(boundary_f(predicted, truth) for predicted, truth in pairs),
        flags={name: tuple(bool(values[index]) for index in counted) for name, values in masks.flags.items()},
    )


def score_video(name: str, objects: Iterable[ObjectMasks], convention: VideoConvention) -> VideoScores:
    """Evaluate all objects of one video.

    Args:
        name: Name of the video.
        objects: Masks of the objects. With an iterator only one object's masks are in memory at a time.
        convention: Selects the frames and objects that count.

    Raises:
        ValueError: An object id occurs twice.
    """
    scores: dict[int, ObjectScores] = {}
    for masks in objects:
        if masks.object_id in scores:
            raise ValueError(f"{name}: object id {masks.object_id} occurs twice")
        scores[masks.object_id] = evaluate_object(masks, convention)
    return VideoScores(name, tuple(scores.values()))


LoadObjects = Callable[[], Iterable[ObjectMasks]]
"""Loads the objects of one video. It must be picklable for worker processes, such as ``functools.partial(load, path)``.
"""


def _attempt(job: tuple[str, LoadObjects, VideoConvention]) -> VideoScores | VideoFailure:
    name, load, convention = job
    try:
        return score_video(name, load(), convention)
    except Exception as error:  # one bad video must not end the others; the text is kept, since an error may not pickle
        return VideoFailure(name, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")


def score_videos(
    videos: Mapping[str, LoadObjects],
    convention: VideoConvention,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> VideoSetScores:
    """Score many videos, optionally in parallel.

    A video whose loading or scoring raises becomes a ``VideoFailure``, and the others continue. Results are in the
    order of ``videos`` and do not depend on ``workers``.

    Args:
        videos: Loader of each video by name.
        convention: Selects the frames and objects that count.
        workers: Number of processes. 1 scores in this process.
        progress: Called with 1 after each video.

    Raises:
        ValueError: ``workers`` is below 1.
        BrokenProcessPool: A worker process died, for example because it ran out of memory.
        Exception: pickle's error for a loader that cannot be sent to a worker.
    """
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}")
    jobs = [(name, load, convention) for name, load in videos.items()]
    results = list[VideoScores | VideoFailure]()

    def collect(outcomes: Iterable[VideoScores | VideoFailure]) -> None:
        for outcome in outcomes:
            results.append(outcome)
            if progress is not None:
                progress(1)

    if workers == 1:
        collect(map(_attempt, jobs))
    else:
        # Workers are spawned, because a forked child of a process with threads (torch starts some) can deadlock.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            collect(pool.map(_attempt, jobs))
    scored = tuple(result for result in results if isinstance(result, VideoScores))
    failures = tuple(result for result in results if isinstance(result, VideoFailure))
    return VideoSetScores(convention.name, scored, failures)
