"""Command ``samdistill evaluate --masks``: score predicted video masks as the DAVIS and SA-V evaluators do."""

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
    """Compute J&F of a folder of predicted masks. No model is loaded.

    Args:
        results: Folder of predictions: ``<video>/<frame>.png`` with object ids, or ``<video>/<object>/<frame>.png``
            with one object each.
        data: Root of DAVIS or SA-V, or its folder of true masks. Images are not needed.
        convention: ``davis2017`` or ``sav``. None uses ``sav`` if there is a folder per object or the true masks are in
            ``Annotations_6fps``, and ``davis2017`` otherwise.
        videos: Largest number of videos, evenly spaced. None uses all.
        workers: Number of processes.
        progress: Show a progress bar.

    Returns:
        A result with one row.

    Raises:
        UserError: A video, frame or object is missing, a frame has another size, or a PNG has no object ids.

    Example:
        >>> samdistill.evaluate_masks("predictions", "DAVIS", progress=False).rows[0].jf
        1.0
    """
    rules = None if convention is None else convention_named(convention)
    if videos is not None and videos < 1:
        raise UserError(f"--videos must be at least 1, got {videos}")
    if workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    found, without_truth = find_videos(as_path(results), as_path(data))
    chosen = evenly(found, videos)
    ignored = [BadInput(name, "no true masks of that name; ignored") for name in without_truth]
    with Progress("scoring", len(chosen), "videos", progress) as bar:
        return score_masks(
            chosen, rules or _suggested(found), ignored=ignored, workers=workers, progress=bar.advance
        )  # fmt: skip


def _suggested(videos: list[MaskVideo]) -> VideoConvention:
    """Choose the convention from the layout of the folders."""
    per_object = any(video.objects for video in videos)
    from_sav = any(video.truth.parent.name == LAYOUTS[1][1] for video in videos)
    return SAV if per_object or from_sav else DAVIS_2017
