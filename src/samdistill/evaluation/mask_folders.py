"""Score folders of predicted video masks against true masks: J&F as in the DAVIS and SA-V evaluators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..data.predicted_masks import MaskVideo, object_masks
from ..data.skipped import BadInput, leave_out
from ..metrics.video import VideoScores, score_videos
from ..metrics.video_frames import VideoConvention
from ..types import UserError
from .video_result import PREDICTIONS, VideoResult, video_rows


def score_masks(
    videos: Sequence[MaskVideo],
    convention: VideoConvention,
    *,
    ignored: Sequence[BadInput] = (),
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> VideoResult:
    """Compute J&F of predicted masks. No model is needed.

    Args:
        videos: True and predicted masks of each video.
        convention: Selects the frames and objects that count.
        ignored: Inputs that are not scored. They are listed in the result.
        workers: Number of processes.
        progress: Called with 1 after each video.

    Returns:
        A result with one row.

    Raises:
        UserError: A video has an error. There is no result then, because figures of the other videos are not comparable
            with those of the whole data set.
    """
    loads = {video.name: partial(object_masks, video, convention) for video in videos}
    scores = score_videos(loads, convention, workers, progress)
    if scores.failures:
        more = f" (and {len(scores.failures) - 1} more videos with errors)" if len(scores.failures) > 1 else ""
        raise UserError(scores.failures[0].error + more)
    skipped = (*ignored, *(bad for video in scores.videos for bad in _uncounted(video)))
    leave_out(skipped)
    rows = video_rows({PREDICTIONS: scores}, {}, convention, skipped)
    return VideoResult(rows, None, convention.name, len(scores.videos), None, None, skipped, {PREDICTIONS: scores})


def _uncounted(video: VideoScores) -> list[BadInput]:
    """List what does not count in a video: the whole video, or single objects."""
    if not video.objects:
        return [BadInput(video.name, "no object counts, because the first true mask is empty")]
    lost = [one.object_id for one in video.objects if not one.frames]
    return [BadInput(f"{video.name}, object {number}", "not visible on any frame that counts") for number in lost]
