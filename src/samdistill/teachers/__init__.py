"""Frozen models that give the training signal through named taps. Importing this registers every teacher."""

from . import sam, sam3
from .base import TEACHERS, Teacher, TeacherInfo, build_teacher, describe_teacher
from .cached import CachedTeacher

__all__ = ["TEACHERS", "CachedTeacher", "Teacher", "TeacherInfo", "build_teacher", "describe_teacher", "sam", "sam3"]
