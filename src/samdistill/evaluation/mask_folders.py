"""Score folders of predicted masks that came from anywhere against folders of true ones: J&F as DAVIS and SA-V do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..data.predicted_masks import MaskVideo, object_masks
from ..data.skipped import BadInput, leave_out
from ..metrics.video import VideoScores, evaluate_videos
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
    """J&F of predictions that were made before; no model is needed.

    ignored: inputs that are not scored, for the result. workers: processes. progress: called with 1 after each video.
    Raises ``UserError`` for whatever is wrong with a video, since figures of the others alone are another benchmark's.
    """
    loads = {video.name: partial(object_masks, video, convention) for video in videos}
    scores = evaluate_videos(loads, convention, workers, progress)
    if scores.failures:
        more = f" (and {len(scores.failures) - 1} more videos with mistakes)" if len(scores.failures) > 1 else ""
        raise UserError(scores.failures[0].error + more)
    skipped = (*ignored, *(bad for video in scores.videos for bad in _uncounted(video)))
    leave_out(skipped)
    rows = video_rows({PREDICTIONS: scores}, {}, convention, skipped)
    return VideoResult(rows, None, convention.name, len(scores.videos), None, None, skipped, {PREDICTIONS: scores})


def _uncounted(video: VideoScores) -> list[BadInput]:
    if not video.objects:
        return [BadInput(video.name, "no object counts: its first true mask shows none")]
    lost = [one.object_id for one in video.objects if not one.frames]
    return [BadInput(f"{video.name}, object {number}", "visible on no frame that counts") for number in lost]
