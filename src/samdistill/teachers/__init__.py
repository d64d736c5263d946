"""Frozen models that give the training signal. Importing this registers every encoder that is read through taps."""

from . import sam, sam3
from .base import TEACHERS, Teacher, TeacherInfo, build_teacher, describe_teacher
from .cached import CachedTeacher
from .cached_levels import CachedLevels, frame_key
from .ensemble import Ensemble, shares
from .live_levels import LiveLevels
from .promptable import PromptTeacher, check_match, fit_projection
from .sam3_detector import DetectorInfo, Sam3Detector, describe_detector

__all__ = [
    "TEACHERS", "CachedLevels", "CachedTeacher", "DetectorInfo", "Ensemble", "LiveLevels", "PromptTeacher",
    "Sam3Detector", "Teacher", "TeacherInfo", "build_teacher", "check_match", "describe_detector", "describe_teacher",
    "fit_projection", "frame_key", "sam", "sam3", "shares",
]  # fmt: skip
