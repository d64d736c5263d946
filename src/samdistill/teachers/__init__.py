"""Frozen teacher models and their cached features. Importing this package registers every image encoder with taps."""

from . import sam, sam3
from .base import (
    TEACHERS,
    Frame,
    FrameSignals,
    Maps,
    MapSignals,
    OnlineTeacher,
    Signals,
    TeacherInfo,
    build_teacher,
    describe_teacher,
)
from .ensemble import Ensemble, shares
from .promptable import PromptTeacher, check_match, fit_projection
from .running import RunningFrames, RunningMaps
from .sam3_detector import DetectorInfo, Sam3Detector, describe_detector
from .stored import StoredMaps, frame_key

__all__ = [
    "TEACHERS", "DetectorInfo", "Ensemble", "Frame", "FrameSignals", "MapSignals", "Maps", "OnlineTeacher",
    "PromptTeacher", "RunningFrames", "RunningMaps", "Sam3Detector", "Signals", "StoredMaps", "TeacherInfo",
    "build_teacher", "check_match", "describe_detector", "describe_teacher", "fit_projection", "frame_key", "sam",
    "sam3", "shares",
]  # fmt: skip
