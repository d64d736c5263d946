"""Opening of any model that tracks objects through a video, and of a session with it."""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from transformers import Sam2VideoModel, Sam3TrackerVideoModel

from ..checkpoints.trackers import Tracker, Worded, load_tracker, load_worded, tracker_class
from ..types import UserError
from .concepts import StudentDetector, load_concept_model
from .predict import answers_prompts
from .session import Session
from .tracker import TrackerSession, WordSession
from .video import VideoSession

VideoModel = StudentDetector | Tracker | Worded
_SOURCES = (
    "a run of the video job, a detection student, or a folder of a Sam2VideoModel, Sam3TrackerVideoModel or "
    "Sam3VideoModel"
)


def open_video_model(path: str | Path, *, worded: bool, device: torch.device | str = "cpu") -> VideoModel:
    """Load a model that tracks objects, in float32 and eval mode.

    Args:
        path: A student of the detection or the video job, or what ``load_tracker`` loads.
        worded: Objects are given by a phrase alone. Of a ``Sam3VideoModel`` this needs the detector too.
        device: Device of the model.

    Raises:
        UserError: The model cannot be read, cannot track, or takes no words.
    """
    if tracker_class(path) is not None:
        if not worded:
            return load_tracker(path).to(device)
        found = load_worded(path)
        found.model.to(device)
        return found
    if answers_prompts(path):
        raise UserError(f"{path}: no memory in it, so it cannot track; give {_SOURCES}")
    student = load_concept_model(path, device=device)
    if not isinstance(student, StudentDetector):
        raise UserError(f"{path}: a detector without a memory, so it cannot track; give {_SOURCES}")
    return student


@singledispatch
def start_session(model: Any, threshold: float = 0.5, geometry: str | None = None) -> Session:
    """Start a session with a model.

    Args:
        model: A model as of ``open_video_model``.
        threshold: Minimum score of a visible object, in 0..1.
        geometry: ``square`` or ``longest_side``; None uses the geometry saved with the model.

    Raises:
        UserError: The model cannot track, or a value is out of range.
    """
    raise UserError(f"a {type(model).__name__} cannot track; give {_SOURCES}")


@start_session.register(StudentDetector)
def _of_student(model: StudentDetector, threshold: float = 0.5, geometry: str | None = None) -> Session:
    return VideoSession(model, threshold=threshold, geometry=geometry)


@start_session.register(Sam2VideoModel)
@start_session.register(Sam3TrackerVideoModel)
def _of_tracker(model: Tracker, threshold: float = 0.5, geometry: str | None = None) -> Session:
    return TrackerSession(model, threshold=threshold, geometry=geometry)


@start_session.register(Worded)
def _of_words(model: Worded, threshold: float = 0.5, geometry: str | None = None) -> Session:
    return WordSession(model, threshold=threshold, geometry=geometry)
