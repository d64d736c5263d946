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
    TextSignals,
    build_teacher,
    describe_teacher,
    teacher_kind,
)
from .ensemble import Ensemble, shares
from .promptable import PromptTeacher, check_match, fit_projection
from .running import RunningFrames, RunningMaps
from .sam3_detector import DetectorInfo, Sam3Detector, describe_detector
from .sam3_text import Sam3Text, TextInfo, describe_text
from .stored import StoredMaps, frame_key, phrase_records

__all__ = [
    "TEACHERS", "DetectorInfo", "Ensemble", "Frame", "FrameSignals", "MapSignals", "Maps", "OnlineTeacher",
    "PromptTeacher", "RunningFrames", "RunningMaps", "Sam3Detector", "Sam3Text", "Signals", "StoredMaps", "TeacherInfo",
    "TextInfo", "TextSignals", "build_teacher", "check_match", "describe_detector", "describe_teacher", "describe_text",
    "fit_projection", "frame_key", "phrase_records", "sam", "sam3", "shares", "teacher_kind",
]  # fmt: skip
