"""Frozen models that give the training signal. Importing this registers every encoder that is read through taps."""

from . import sam, sam3
from .base import TEACHERS, Teacher, TeacherInfo, build_teacher, describe_teacher
from .cached import CachedTeacher
from .sam3_detector import DetectorInfo, Sam3Detector, describe_detector

__all__ = [
    "TEACHERS", "CachedTeacher", "DetectorInfo", "Sam3Detector", "Teacher", "TeacherInfo", "build_teacher",
    "describe_detector", "describe_teacher", "sam", "sam3",
]  # fmt: skip
