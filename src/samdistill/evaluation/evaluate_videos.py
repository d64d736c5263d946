"""Command ``samdistill evaluate`` for videos: J&F of a student with and without its memory, or of a SAM with its
own.
"""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.trackers import Tracker, load_tracker, tracker_class
from ..data.davis import LAYOUTS, DavisSource
from ..data.layouts import layout_of, video_kind
from ..data.masks import SPLITS
from ..data.predicted_masks import OFFICIAL_IDS
from ..data.skipped import reporting
from ..data.sources import evenly
from ..data.videos import VideoSource, open_videos
from ..dist import default_device
from ..inference.concepts import StudentDetector, load_concept_model
from ..inference.geometry import check_geometry, own_geometry
from ..io import as_path
from ..metrics.video_frames import DAVIS_2017, SAV, VideoConvention
from ..progress import Progress
from ..registry import did_you_mean
from ..teachers import Sam3Detector
from ..types import UserError
from .video_result import VideoResult
from .videos import evaluate_videos_with

RULES = {"davis2017": DAVIS_2017, "sav": SAV}
"""Conventions by the names that ``evaluate.convention`` accepts."""
HELD_OUT = "val"
"""Folder of the split that is evaluated."""


def convention_named(name: str) -> VideoConvention:
    """Return the convention called ``name``.

    Raises:
        UserError: There is no convention of that name.
    """
    if name not in RULES:
        raise UserError(f"no convention is called {name!r}{did_you_mean(name, list(RULES))}")
    return RULES[name]


def held_out_videos(root: Path) -> tuple[VideoSource, VideoConvention]:
    """Open the videos to evaluate on.

    Args:
        root: Folder of videos. If it has splits, ``val`` is used, or another split if there is no ``val``. Of a
            complete DAVIS 2017 the videos listed in ``ImageSets/2017/val.txt`` are used.

    Returns:
        The videos, and the convention that fits their layout.

    Raises:
        UserError: There are no videos.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of videos")
    kind = video_kind(root)
    if kind is None:
        raise UserError(
            f"{root}: no videos with masks here; give a folder with sav_<id>.mp4 and sav_<id>_manual.json, or one with "
            "JPEGImages/<video>/ and Annotations/<video>/"
        )
    place = next(folder for folder in (root / HELD_OUT, root, *(root / n for n in SPLITS)) if layout_of(folder) == kind)
    listed = place / OFFICIAL_IDS
    source = open_videos(place, kind, "held_out", 1.0, ids=listed if kind == "davis" and listed.is_file() else None)
    # SA-V publishes the val and test splits as folders of frames
    from_sav = kind == "sav" or (isinstance(source, DavisSource) and source.images.name == LAYOUTS[1][0])
    return source, SAV if from_sav else DAVIS_2017


@reporting("evaluate")
def evaluate_videos(
    model: str | Path, data: str | Path, *, teacher: str | Path | None = None, convention: str | None = None,
    videos: int | None = None, every_frame: bool = False, geometry: str | None = None, workers: int = 1,
    progress: bool = True,
) -> VideoResult:  # fmt: skip
    """Compute J&F of a student without memory, with its own memory, and with its teacher's feature maps as memory.

    Args:
        model: A run of the video job, or its ``student/`` folder; or what ``load_tracker`` loads, a SAM with its own
            memory, which has one row.
        data: SA-V, DAVIS or the sandbox's videos. If the folder has splits, ``val`` is used.
        teacher: A SAM 3 that ``load_concept_model`` loads. None omits its row.
        convention: ``davis2017`` or ``sav``. None uses the one that fits the layout of ``data``.
        videos: Largest number of videos, evenly spaced. None uses all.
        every_frame: Also process the frames between annotated frames.
        geometry: Placement of frames on the canvas, ``square`` or ``longest_side``. None uses the student's own.
        workers: Number of scoring processes.
        progress: Show a progress bar.

    Returns:
        One row per memory.

    Raises:
        UserError: A model or the data cannot be loaded, or cannot be measured.

    Example:
        >>> samdistill.evaluate_videos("runs/video", "data/sav", progress=False).row("student").objects
        4
    """
    rules = None if convention is None else convention_named(convention)
    if geometry is not None:
        check_geometry(geometry)
    if videos is not None and videos < 1:
        raise UserError(f"--videos must be at least 1, got {videos}")
    if workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    source, suggested = held_out_videos(as_path(data))
    student = _tracking(model)
    theirs = None if teacher is None else _teacher(teacher, student)
    keys, network = evenly(source.keys, videos), student.model if isinstance(student, StudentDetector) else student
    with Progress("evaluating", len(keys), "videos", progress) as bar:
        return evaluate_videos_with(
            student, source, keys, convention=rules or suggested,
            every_frame=every_frame, teacher=theirs, geometry=geometry or own_geometry(network), workers=workers,
            progress=bar.advance,
        )  # fmt: skip


def _tracking(path: str | Path) -> StudentDetector | Tracker:
    if tracker_class(path) is not None:
        return load_tracker(path).to(default_device())
    found = load_concept_model(path, device=default_device())
    if not isinstance(found, StudentDetector) or not found.model.config.memory_latents:
        raise UserError(
            f"{path}: this model has no video memory; give a run of the video job (samdistill train with job: video), "
            "or a folder of a Sam2VideoModel, Sam3TrackerVideoModel or Sam3VideoModel"
        )
    return found


def _teacher(path: str | Path, student: StudentDetector | Tracker) -> Sam3Detector:
    """Load the teacher with the student's canvas size, at which its feature maps were cached for training."""
    if not isinstance(student, StudentDetector):
        raise UserError(f"--teacher: {path}: a SAM's own memory holds no maps of a teacher; leave --teacher out")
    found = load_concept_model(path, student.image_size, default_device())
    if not isinstance(found, Sam3Detector):
        raise UserError(
            f"--teacher: {path}: this model is a student; give the SAM 3 whose feature maps were used in training"
        )
    width = student.model.config.vision_config.fpn_hidden_size
    if found.info.hidden_size != width:
        raise UserError(
            f"--teacher: {path}: its feature maps have {found.info.hidden_size} channels, the student's {width}"
        )
    return found
