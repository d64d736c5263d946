"""Which frames of an object count in a video benchmark, and which of them are hard: conventions and visibility flags.

The conventions are those of two published evaluators, read as they are and written here from the facts:
davisvideochallenge/davis2017-evaluation (``davis2017/evaluation.py``, ``davis2017/davis.py``) and facebookresearch/sam2
(``sav_dataset/utils/sav_benchmark.py``). No torch here: worker processes import this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

VOID = 255
"""The palette id that DAVIS gives to pixels of no object."""
OCCLUDED_BELOW = 0.75
"""An object counts as occluded where less than this share of it is visible."""


@dataclass(frozen=True)
class VideoConvention:
    """Which annotated frames of an object count, and whether the object counts at all.

    A frame here is one that the ground truth annotates: every frame in DAVIS, every 4th in SA-V. Predictions on other
    frames are never looked at. First and last mean those of the object's own annotated frames, the empty ones among
    them too: who starts an object on a later frame gives its frames from there on.

    name: of the convention, for results.
    skip_first: the first annotated frame does not count; a semi-supervised model was given the answer there.
    skip_last: the last one does not count either.
    from_first_frame: True: objects are those of the video's first annotated frame, see ``first_frame_objects``, nothing
    is known of others, and all the frames left count. False: frames count from the first (of those left) on which the
    object is visible or predicted; earlier ones, where both masks are empty, would be right for nothing. An object that
    is visible on none of those left does not count.

    Once frames count, one where both masks are empty is right in both conventions: J = F = 1.
    """

    name: str
    skip_first: bool
    skip_last: bool
    from_first_frame: bool

    def counted(self, visible: Bool[np.ndarray, " t"], predicted: Bool[np.ndarray, " t"]) -> Int[np.ndarray, " n"]:
        """Ascending indices of the frames that count; none where the object does not count.

        visible, predicted: whether the true and the predicted mask of each annotated frame hold any pixel.
        """
        left = np.arange(len(visible))[self.inner(len(visible))]
        if self.from_first_frame:
            return left
        if not visible[left].any():
            return left[:0]
        return left[np.argmax((visible | predicted)[left]) :]

    def inner(self, frames: int) -> slice:
        """The annotated frames left of so many; only these are looked at."""
        return slice(int(self.skip_first), max(frames - int(self.skip_last), int(self.skip_first)))


def first_frame_objects(seen: Iterable[int]) -> list[int]:
    """The objects of a video by the ids that its first annotated frame shows: DAVIS counts all from 1 to the greatest.

    An id in between counts too. Where it comes late, a prediction that knows the first frame alone misses it; where it
    does not exist, a prediction without it is right on every frame. An id above the greatest does not count. 0 and
    ``VOID`` are no objects in DAVIS; leave them out of ``seen`` unless they are objects.
    """
    ids = set(seen)
    greatest = max((number for number in ids if number != VOID), default=0)
    return sorted(ids.union(range(1, greatest + 1)))


DAVIS_2017 = VideoConvention("davis_2017", skip_first=True, skip_last=True, from_first_frame=True)
"""DAVIS 2017, semi-supervised. Its evaluator takes the objects of the first frame (ids 1 to the greatest there) and
cuts the first and the last frame off the sequence. Pixels of id 255 are background."""

SAV = VideoConvention("sav", skip_first=True, skip_last=True, from_first_frame=False)
"""SA-V. Its evaluator lists the mask files of each object on their own and cuts the first and the last off that list,
whether the object is visible there or not. Of the others it starts to count at the first with a true or a predicted
pixel. In SA-V val and test every object is visible on frame 0, so the first file is the prompted frame; in the json
files of SA-V train an object may come later, and then only an empty first frame is cut off.
On an object that none of the files left shows, the evaluator stops with an assertion; here it does not count."""

CONVENTIONS = {convention.name: convention for convention in (DAVIS_2017, SAV)}


def _same_length(visible: np.ndarray, other: np.ndarray, name: str) -> None:
    if visible.shape != other.shape or visible.ndim != 1:
        raise ValueError(f"one value per frame: visible has the shape {visible.shape}, {name} {other.shape}")


def absent(visible: Bool[np.ndarray, " t"]) -> Bool[np.ndarray, " t"]:
    """Frames where an object that was visible on an earlier annotated frame is not; those before it came are not."""
    return ~visible & np.logical_or.accumulate(visible)


def reappeared(
    visible: Bool[np.ndarray, " t"], frames: Sequence[int] | Int[np.ndarray, " t"], within: int
) -> Bool[np.ndarray, " t"]:
    """Frames on which an object is back: visible again since at most ``within`` video frames.

    It returns on an annotated frame where it is visible, but was absent on the annotated frame before. That frame is
    flagged, and so are the later ones up to ``within`` after it, as long as it stays visible; with 0 the return alone.
    An absence that begins and ends between two annotated frames is not seen.

    visible: whether the true mask holds any pixel. frames: number of each in the video, ascending (0, 4, 8 in SA-V), so
    that ``within`` is a time, however densely a video is annotated. Raises ValueError where their lengths differ.
    """
    numbers = np.asarray(frames, dtype=np.int64)
    _same_length(visible, numbers, "frames")
    returns = visible.copy()
    returns[:1] = False
    returns[1:] &= absent(visible)[:-1]
    # the index of the last return so far; a visible frame belongs to it, since every absence ends in a new return
    last = np.maximum.accumulate(np.where(returns, np.arange(len(visible)), -1))
    return visible & (last >= 0) & (numbers - numbers[last] <= within)


def occluded(
    visible: Bool[np.ndarray, " t"], visible_share: Float[np.ndarray, " t"], below: float = OCCLUDED_BELOW
) -> Bool[np.ndarray, " t"]:
    """Frames where an object is visible, but less than ``below`` of it.

    visible_share: visible area over the area without anything in front of it, 0..1; any value, NaN too, where the
    object is not visible. The whole area is known in rendered videos alone. Raises ValueError for a share that is
    outside 0..1 on a visible frame, and where the lengths differ.
    """
    share = np.asarray(visible_share, dtype=np.float64)
    _same_length(visible, share, "visible_share")
    if not ((share[visible] >= 0) & (share[visible] <= 1)).all():
        raise ValueError("visible_share has to lie in 0..1 wherever the object is visible")
    return visible & (share < below)


def visibility_flags(
    truth: Bool[np.ndarray, "t h w"],
    frames: Sequence[int],
    within: int,
    visible_share: Float[np.ndarray, " t"] | None = None,
) -> dict[str, Bool[np.ndarray, " t"]]:
    """The flags of one object's annotated frames, for ``ObjectMasks.flags``: ``absent``, ``reappeared``, ``occluded``.

    The first two follow from the true masks, see ``reappeared`` for ``frames`` and ``within``. ``occluded`` is there
    where ``visible_share`` is given, and means less than ``OCCLUDED_BELOW`` visible. Raises ValueError as those do.
    """
    visible = truth.any((1, 2))
    flags = {"absent": absent(visible), "reappeared": reappeared(visible, frames, within)}
    return flags if visible_share is None else flags | {"occluded": occluded(visible, visible_share)}
