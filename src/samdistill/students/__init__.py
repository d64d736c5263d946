"""Students: timm backbones with a head, as Hugging Face models. Importing this registers them with transformers."""

from __future__ import annotations

from .backbones import STUDENTS, resolve_backbone
from .catalogue import StudentInfo, breakdown, list_students
from .heads import HEADS, HeadCost, compare_heads
from .trunk import StudentTrunk, StudentTrunkConfig, build_trunk

__all__ = [
    "HEADS",
    "STUDENTS",
    "HeadCost",
    "StudentInfo",
    "StudentTrunk",
    "StudentTrunkConfig",
    "breakdown",
    "build_trunk",
    "compare_heads",
    "list_students",
    "resolve_backbone",
]
