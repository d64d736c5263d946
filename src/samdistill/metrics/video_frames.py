"""Frames that count in a video benchmark (conventions), and frames that are hard (visibility flags).

The conventions are those of two published evaluators, implemented independently:
davisvideochallenge/davis2017-evaluation (``davis2017/evaluation.py``, ``davis2017/davis.py``) and facebookresearch/sam2
(``sav_dataset/utils/sav_benchmark.py``). This file does not import torch, because worker processes import it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

VOID = 255
"""Palette id that DAVIS gives to pixels of no object."""
OCCLUDED_BELOW = 0.75
"""An object counts as occluded if less than this share of it is visible."""


@dataclass(frozen=True)
class VideoConvention:
    """Selection of the annotated frames of an object that count, and whether the object counts at all.

    A frame here is a frame that the ground truth annotates: every frame in DAVIS, every 4th in SA-V. Predictions on
    other frames are not used. The first and the last frame are those of the object's own annotated frames, including
    empty ones. For an object that starts on a later frame, pass its frames from there on.

    A frame that counts is correct if both masks are empty, in every convention: J = F = 1.

    Args:
        name: Name of the convention in results.
        skip_first: The first annotated frame does not count, because a semi-supervised model was given its mask.
        skip_last: The last annotated frame does not count.
        from_first_frame: If True, the objects are those of the video's first annotated frame (see
            ``first_frame_objects``) and all remaining frames count. If False, frames count from the first remaining one
            on which the object is visible or predicted, because empty masks before it would be correct without any
            tracking. An object that is visible on no remaining frame does not count.
    """

    name: str
    skip_first: bool
    skip_last: bool
    from_first_frame: bool

    def counted(self, visible: Bool[np.ndarray, " t"], predicted: Bool[np.ndarray, " t"]) -> Int[np.ndarray, " n"]:
        """Return the ascending indices of the frames that count. There are none if the object does not count.

        Args:
            visible: Whether the true mask of each annotated frame has a pixel.
            predicted: Whether the predicted mask of each annotated frame has a pixel.
        """
        left = np.arange(len(visible))[self.inner(len(visible))]
        if self.from_first_frame:
            return left
        if not visible[left].any():
            return left[:0]
        return left[np.argmax((visible | predicted)[left]) :]

    def inner(self, frames: int) -> slice:
        """Return the slice of ``frames`` annotated frames that remains without the first and the last one."""
        return slice(int(self.skip_first), max(frames - int(self.skip_last), int(self.skip_first)))


def first_frame_objects(seen: Iterable[int]) -> list[int]:
    """Return the ids of a video's objects from those on its first annotated frame: 1 to the largest, as in DAVIS.

    An id in between counts even if it is not on the first frame. If the object appears later, a model that knows only
    the first frame misses it. If it does not exist, a model that predicts nothing is correct on every frame. An id
    above the largest does not count. In DAVIS, 0 and ``VOID`` are not objects, so leave them out of ``seen``.

    Args:
        seen: Ids on the first annotated frame.
    """
    ids = set(seen)
    greatest = max((number for number in ids if number != VOID), default=0)
    return sorted(ids.union(range(1, greatest + 1)))


DAVIS_2017 = VideoConvention("davis_2017", skip_first=True, skip_last=True, from_first_frame=True)
"""DAVIS 2017, semi-supervised. The evaluator takes the objects of the first frame (ids 1 to the largest) and removes
the first and the last frame of the sequence. Pixels of id 255 are background.
"""

SAV = VideoConvention("sav", skip_first=True, skip_last=True, from_first_frame=False)
"""SA-V. The evaluator lists the mask files of each object and removes the first and the last file, whether the object
is visible there or not. It counts from the first remaining file with a true or predicted pixel. In SA-V val and test
every object is visible on frame 0, so the first file is the prompted frame. In the JSON files of SA-V train an object
may appear later, and then only an empty first frame is removed. For an object that is in none of the remaining files
the evaluator stops with an assertion; here the object does not count.
"""


def _same_length(visible: np.ndarray, other: np.ndarray, name: str) -> None:
    if visible.shape != other.shape or visible.ndim != 1:
        raise ValueError(f"one value per frame: visible has the shape {visible.shape}, {name} {other.shape}")


def absent(visible: Bool[np.ndarray, " t"]) -> Bool[np.ndarray, " t"]:
    """Frames on which the object is not visible, but was on an earlier annotated frame.

    Frames before its first appearance are not included.
    """
    return ~visible & np.logical_or.accumulate(visible)


def reappeared(
    visible: Bool[np.ndarray, " t"], frames: Sequence[int] | Int[np.ndarray, " t"], within: int
) -> Bool[np.ndarray, " t"]:
    """Frames on which an object is visible again after an absence of at least one annotated frame.

    The object returns on an annotated frame where it is visible and was absent on the annotated frame before. That
    frame is flagged, and so are the later ones up to ``within`` video frames after it, as long as the object stays
    visible. An absence between two annotated frames is not detected.

    Args:
        visible: Whether the true mask of each annotated frame has a pixel.
        frames: Frame numbers in the video, ascending (0, 4, 8, ... in SA-V). They make ``within`` independent of the
            density of the annotation.
        within: Video frames after the return that are still flagged. 0 flags only the return.

    Raises:
        ValueError: The lengths differ.
    """
    numbers = np.asarray(frames, dtype=np.int64)
    _same_length(visible, numbers, "frames")
    returns = visible.copy()
    returns[:1] = False
    returns[1:] &= absent(visible)[:-1]
    # Index of the last return. For a visible frame it began the current appearance, as every absence ends in a return.
    last = np.maximum.accumulate(np.where(returns, np.arange(len(visible)), -1))
    return visible & (last >= 0) & (numbers - numbers[last] <= within)


def occluded(
    visible: Bool[np.ndarray, " t"], visible_share: Float[np.ndarray, " t"], below: float = OCCLUDED_BELOW
) -> Bool[np.ndarray, " t"]:
    """Frames on which less than ``below`` of the object is visible, but not nothing.

    Args:
        visible: Whether the true mask of each annotated frame has a pixel.
        visible_share: Visible area divided by the area without occluders, 0..1. Values of frames without the object are
            ignored and may be NaN. The full area is only known in rendered videos.
        below: Largest share, exclusive.

    Raises:
        ValueError: A share of a visible frame is outside 0..1, or the lengths differ.
    """
    share = np.asarray(visible_share, dtype=np.float64)
    _same_length(visible, share, "visible_share")
    if not ((share[visible] >= 0) & (share[visible] <= 1)).all():
        raise ValueError("`visible_share` must be in 0..1 on frames where the object is visible")
    return visible & (share < below)


def visibility_flags(
    truth: Bool[np.ndarray, "t h w"],
    frames: Sequence[int],
    within: int,
    visible_share: Float[np.ndarray, " t"] | None = None,
) -> dict[str, Bool[np.ndarray, " t"]]:
    """Return an object's flags for ``ObjectMasks.flags``: ``absent``, ``reappeared`` and ``occluded``.

    Args:
        truth: True masks on the annotated frames.
        frames: Frame numbers in the video, see ``reappeared``.
        within: See ``reappeared``.
        visible_share: See ``occluded``. Without it there is no flag ``occluded``.

    Raises:
        ValueError: Lengths differ, or a share is out of range.
    """
    visible = truth.any((1, 2))
    flags = {"absent": absent(visible), "reappeared": reappeared(visible, frames, within)}
    return flags if visible_share is None else flags | {"occluded": occluded(visible, visible_share)}
