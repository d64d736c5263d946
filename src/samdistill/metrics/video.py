"""How well objects are followed through a video: region similarity J, boundary accuracy F and their mean J&F.

Defined in Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation, CVPR 2016, and
Pont-Tuset et al., The 2017 DAVIS Challenge on Video Object Segmentation, 2017 (arXiv 1704.00675). Details that the
papers leave open are those of davisvideochallenge/davis2017-evaluation (``davis2017/metrics.py``), which the SA-V
evaluator of facebookresearch/sam2 shares; written from the facts. The latter multiplies by 100, here every figure lies
in 0..1. ``video_frames`` says which frames count. No torch here: worker processes import this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from ..errors import UserError
from .video_frames import VOID, VideoConvention

BOUND_TH = 0.008
"""Tolerance of a boundary, as a share of the image diagonal."""


def _check(predicted: np.ndarray, truth: np.ndarray, axes: int) -> None:
    if predicted.shape != truth.shape or predicted.ndim != axes:
        raise ValueError(f"masks of one size are compared: predicted {predicted.shape}, truth {truth.shape}")
    if predicted.dtype != np.bool_ or truth.dtype != np.bool_:
        raise ValueError(f"masks are bool arrays: predicted is {predicted.dtype}, truth {truth.dtype}")


def region_similarity(predicted: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """J: intersection over union, 0..1; 1 where both are empty. ValueError for other shapes or types than declared."""
    _check(predicted, truth, 2)
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def boundary(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels that differ from their east, south or south-east neighbour: the outline, half a pixel to the north-west.

    What lies outside the image is no neighbour. So an object cut off by the image has no outline there, and a mask of
    the whole image has none at all.
    """
    edge = np.zeros_like(mask)
    edge[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    edge[:-1] |= mask[:-1] ^ mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edge


def boundary_tolerance(height: int, width: int, bound_th: float = BOUND_TH) -> int:
    """Pixels by which outlines may lie apart: a share of the image diagonal, rounded up. 8 for 480 x 854."""
    return math.ceil(bound_th * math.sqrt(height * height + width * width))


def _near(points: Bool[np.ndarray, "h w"], others: Bool[np.ndarray, "h w"], radius: int) -> int:
    """How many of ``points`` have one of ``others`` at most ``radius`` away: |points & dilation of others by a disk|.

    The disk is that of scikit-image, all offsets with dx² + dy² <= radius². It is a run of pixels in each of its rows,
    and a run holds one of ``others`` where their running sum grows over it. Only integers are compared, so this equals
    the dilation exactly, without dilating: the disk is tried at the points alone.
    """
    sums = np.pad(others, ((radius, radius), (radius + 1, radius))).cumsum(1, dtype=np.int32)
    rows, columns = np.nonzero(points)
    near = np.zeros(len(rows), dtype=np.bool_)
    for dy in range(-radius, radius + 1):
        half, line = math.isqrt(radius * radius - dy * dy), rows + (radius + dy)
        near |= sums[line, columns + (radius + half + 1)] > sums[line, columns + (radius - half)]
    return int(np.count_nonzero(near))


def boundary_f(predicted: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"], bound_th: float = BOUND_TH) -> float:
    """F: harmonic mean of precision and recall of the outline within ``boundary_tolerance``, 0..1.

    Precision is the share of the predicted outline near the true one, recall the share of the true outline near the
    predicted one. Two outlines without a pixel agree (F = 1). With one of them empty F = 0: the share of nothing counts
    as 1, the other one is 0. Raises ValueError as ``region_similarity``.
    """
    _check(predicted, truth, 2)
    found, wanted = boundary(predicted), boundary(truth)
    found_pixels, wanted_pixels = np.count_nonzero(found), np.count_nonzero(wanted)
    if not found_pixels or not wanted_pixels:
        return float(found_pixels == wanted_pixels)
    radius = boundary_tolerance(*truth.shape, bound_th)
    either = found | wanted  # no outline lies beyond its box, so only that is searched: most objects are small
    rows, columns = np.flatnonzero(either.any(1)), np.flatnonzero(either.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    precision = _near(found[box], wanted[box], radius) / found_pixels
    recall = _near(wanted[box], found[box], radius) / wanted_pixels
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def split_ids(
    id_maps: Integer[np.ndarray, "*t h w"], object_ids: Iterable[int] | None = None
) -> dict[int, Bool[np.ndarray, "*t h w"]]:
    """The mask of each object in maps of object ids, such as palette PNGs. An id that is not there has an empty mask.

    object_ids: those wanted; all but 0 and ``VOID`` where None. Ask a prediction for the ids of the truth; DAVIS has
    those of the first frame: ``split_ids(maps, first_frame_objects(split_ids(maps[0])))``. Raises ValueError for other
    than integers.
    """
    if not np.issubdtype(id_maps.dtype, np.integer):
        raise ValueError(f"a map of object ids holds integers, not {id_maps.dtype} (shape {id_maps.shape})")
    wanted = [i for i in np.unique(id_maps).tolist() if i not in (0, VOID)] if object_ids is None else object_ids
    return {object_id: id_maps == object_id for object_id in wanted}


@dataclass(frozen=True, eq=False)
class ObjectMasks:
    """One object on its annotated frames: what is true and what was predicted.

    frames: numbers in the video, ascending. truth, predicted: one mask per frame; empty where the object is invisible.
    flags: names for some of the frames, so that figures on these alone can be had; see ``visibility_flags``.

    Raises ValueError where sizes or lengths differ, for masks that are not bool, and for frames out of order.
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
            raise ValueError(f"object {self.object_id}: frames have to ascend, got {list(self.frames)}")


@dataclass(frozen=True)
class ObjectScores:
    """J and F of one object on the frames that count; no frame where the object does not count.

    flags: per name, whether each of these frames carries it.
    """

    object_id: int
    frames: tuple[int, ...]
    j: tuple[float, ...]
    f: tuple[float, ...]
    flags: Mapping[str, tuple[bool, ...]]

    def summary(self, flag: str | None = None) -> dict[str, float]:
        """``j``, ``f``: means over frames. ``jf``: the mean of both. ``frames``: their number.

        flag: only frames that carry it. Empty where there is no frame to average.
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
        """DAVIS' further figures. ``j_recall``: share of frames with J above 0.5. ``j_decay``: mean J of the first
        quarter of the frames less that of the last. ``f_recall``, ``f_decay``: the same of F. Empty without a frame."""
        if not self.frames:
            return {}
        measured = {"j": np.array(self.j), "f": np.array(self.f)}
        recalls = {f"{name}_recall": float((values > 0.5).mean()) for name, values in measured.items()}
        return recalls | {f"{name}_decay": _decay(values) for name, values in measured.items()}

    def to_dict(self) -> dict[str, Any]:
        """Figures over all frames and over those of each flag; J and F per frame stay in the fields."""
        groups = {flag: self.summary(flag) for flag in self.flags}
        return {"object_id": self.object_id, "overall": self.summary(), "groups": groups}


def _decay(values: Float[np.ndarray, " n"]) -> float:
    """The quarters of the official evaluator share their borders."""
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    return float(values[: ends[1] + 1].mean() - values[ends[3] :].mean())


def _mean_of_objects(objects: Iterable[ObjectScores], flag: str | None) -> dict[str, float]:
    """Objects weigh the same, however many frames they have; those without a frame are left out."""
    figures = [figure for figure in (scores.summary(flag) for scores in objects) if figure]
    if not figures:
        return {}
    j, f = (float(np.mean([figure[name] for figure in figures])) for name in ("j", "f"))
    frames = sum(figure["frames"] for figure in figures)
    return {"j": j, "f": f, "jf": (j + f) / 2, "frames": frames, "objects": float(len(figures))}


@dataclass(frozen=True)
class VideoScores:
    """The objects of one video, in the order they were given."""

    name: str
    objects: tuple[ObjectScores, ...]

    def summary(self, flag: str | None = None) -> dict[str, float]:
        """``j``, ``f``, ``jf``: means over objects of their own means. ``frames``: (object, frame) pairs. ``objects``.

        flag: only frames that carry it, and only objects with such a frame. Empty where there is none.
        """
        return _mean_of_objects(self.objects, flag)

    def to_dict(self) -> dict[str, Any]:
        """Figures of the video and of each object; ``not_scored`` has the ids of objects that do not count."""
        scored = [scores.to_dict() for scores in self.objects if scores.frames]
        left_out = [scores.object_id for scores in self.objects if not scores.frames]
        return {"name": self.name, "overall": self.summary(), "objects": scored, "not_scored": left_out}


@dataclass(frozen=True)
class VideoFailure:
    """A video that could not be evaluated. error: what a ``UserError`` said, or type and message of another."""

    name: str
    error: str


@dataclass(frozen=True)
class VideoSetScores:
    """Many videos under one convention, in the order they were given; those that failed are apart."""

    convention: str
    videos: tuple[VideoScores, ...]
    failures: tuple[VideoFailure, ...]

    @property
    def flags(self) -> list[str]:
        """The names that some object's frames carry or could carry, sorted."""
        return sorted({flag for video in self.videos for scores in video.objects for flag in scores.flags})

    def summary(self, flag: str | None = None) -> dict[str, float]:
        """As ``VideoScores.summary``, over the objects of all videos together.

        Every object weighs the same, not every video: so do the evaluators of DAVIS 2017 and SA-V.
        """
        return _mean_of_objects((scores for video in self.videos for scores in video.objects), flag)

    def statistics(self) -> dict[str, float]:
        """Means of ``ObjectScores.statistics`` over the objects of all videos; empty where none has a frame."""
        each = [found for video in self.videos for scores in video.objects if (found := scores.statistics())]
        return {name: float(np.mean([found[name] for found in each])) for name in each[0]} if each else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and mappings: overall, per flag, per video and object, and what failed."""
        return {
            "convention": self.convention,
            "overall": self.summary(),
            "statistics": self.statistics(),
            "groups": {flag: self.summary(flag) for flag in self.flags},
            "videos": [video.to_dict() for video in self.videos],
            "failures": [asdict(failure) for failure in self.failures],
        }


def evaluate_object(masks: ObjectMasks, convention: VideoConvention) -> ObjectScores:
    """J and F on every frame of the object that counts under ``convention``."""
    counted: Int[np.ndarray, " n"] = convention.counted(masks.truth.any((1, 2)), masks.predicted.any((1, 2)))
    pairs = [(masks.predicted[index], masks.truth[index]) for index in counted]
    return ObjectScores(
        object_id=masks.object_id,
        frames=tuple(int(masks.frames[index]) for index in counted),
        j=tuple(region_similarity(predicted, truth) for predicted, truth in pairs),
        f=tuple(boundary_f(predicted, truth) for predicted, truth in pairs),
        flags={name: tuple(bool(values[index]) for index in counted) for name, values in masks.flags.items()},
    )


def evaluate_video(name: str, objects: Iterable[ObjectMasks], convention: VideoConvention) -> VideoScores:
    """All objects of one video. An iterator keeps one object's masks in memory. ValueError for an id given twice."""
    scores: dict[int, ObjectScores] = {}
    for masks in objects:
        if masks.object_id in scores:
            raise ValueError(f"{name}: object {masks.object_id} is given twice")
        scores[masks.object_id] = evaluate_object(masks, convention)
    return VideoScores(name, tuple(scores.values()))


LoadObjects = Callable[[], Iterable[ObjectMasks]]
"""Loads the objects of one video. To cross to a worker it has to be picklable: ``functools.partial(load, path)``."""


def _attempt(job: tuple[str, LoadObjects, VideoConvention]) -> VideoScores | VideoFailure:
    name, load, convention = job
    try:
        return evaluate_video(name, load(), convention)
    except Exception as error:  # whatever is wrong with one video must not cost the others; an exception may not pickle
        return VideoFailure(name, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")


def evaluate_videos(
    videos: Mapping[str, LoadObjects],
    convention: VideoConvention,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> VideoSetScores:
    """Evaluate many videos, ``workers`` at a time in processes of their own; 1 stays in this process.

    videos: by name, how to load each. Results keep that order and do not depend on ``workers``. A video that raises, at
    loading or after it, becomes a ``VideoFailure``, and the others go on. progress: called with 1 after each video.

    Raises ValueError for ``workers`` below 1, whatever pickle raises for a loader that cannot cross, and
    BrokenProcessPool where a worker died (out of memory, say), since that is no video's fault that could be named.
    """
    if workers < 1:
        raise ValueError(f"workers has to be at least 1, got {workers}")
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
        # spawned: a forked child of a process with threads, as torch starts them, can hang
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            collect(pool.map(_attempt, jobs))
    scored = tuple(result for result in results if isinstance(result, VideoScores))
    failures = tuple(result for result in results if isinstance(result, VideoFailure))
    return VideoSetScores(convention.name, scored, failures)
