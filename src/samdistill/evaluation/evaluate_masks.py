"""``samdistill evaluate --masks``: predicted masks of videos from anywhere, scored as DAVIS and SA-V score them."""

from __future__ import annotations

from pathlib import Path

from ..data.davis import LAYOUTS
from ..data.predicted_masks import MaskVideo, find_videos
from ..data.skipped import BadInput, reporting
from ..data.sources import evenly
from ..io import as_path
from ..metrics.video_frames import DAVIS_2017, SAV, VideoConvention
from ..progress import Progress
from ..types import UserError
from .evaluate_videos import convention_named
from .mask_folders import score_masks
from .video_result import VideoResult


@reporting("evaluate")
def evaluate_masks(
    results: str | Path, data: str | Path, *, convention: str | None = None, videos: int | None = None,
    workers: int = 1, progress: bool = True,
) -> VideoResult:  # fmt: skip
    """J&F of a folder of predicted masks against a folder of true ones; no model runs.

    results: ``<video>/<frame>.png`` with object ids, or ``<video>/<object>/<frame>.png`` with one object each. data: a
    whole DAVIS or SA-V, or its folder of true masks; images need not be there. convention: ``davis2017`` or ``sav``;
    None takes ``sav`` for a folder per object or frames in ``Annotations_6fps``, else ``davis2017``. videos: at most so
    many, spread over the folder. workers: processes. Raises ``UserError`` for a missing video, frame or object, a
    frame of another size, and a PNG that holds no ids.
    """
    rules = None if convention is None else convention_named(convention)
    if videos is not None and videos < 1:
        raise UserError(f"--videos: {videos} leaves nothing to measure")
    if workers < 1:
        raise UserError(f"--workers: {workers} processes cannot score; give 1 or more")
    found, without_truth = find_videos(as_path(results), as_path(data))
    chosen = evenly(found, videos)
    ignored = [BadInput(name, "no true masks of that name; ignored") for name in without_truth]
    with Progress("scoring", len(chosen), "videos", progress) as bar:
        return score_masks(
            chosen, rules or _suggested(found), ignored=ignored, workers=workers, progress=bar.advance
        )  # fmt: skip


def _suggested(videos: list[MaskVideo]) -> VideoConvention:
    per_object = any(video.objects for video in videos)
    from_sav = any(video.truth.parent.name == LAYOUTS[1][1] for video in videos)
    return SAV if per_object or from_sav else DAVIS_2017
