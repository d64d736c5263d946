"""Students: timm backbones with a head, as Hugging Face models. Importing this registers them with transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .backbones import STUDENTS, resolve_backbone
from .catalogue import StudentInfo, breakdown, list_students
from .heads import HEADS, HeadCost, compare_heads
from .sam3_config import EfficientSam3Config, PyramidConfig, efficient_sam3_config
from .trunk import StudentTrunk, StudentTrunkConfig, build_trunk

if TYPE_CHECKING:
    from .pyramid import PyramidModel
    from .sam3 import EfficientSam3Model, EfficientSam3Output, build_detector, inherit

__all__ = [
    "HEADS",
    "STUDENTS",
    "EfficientSam3Config",
    "EfficientSam3Model",
    "EfficientSam3Output",
    "HeadCost",
    "PyramidConfig",
    "PyramidModel",
    "StudentInfo",
    "StudentTrunk",
    "StudentTrunkConfig",
    "breakdown",
    "build_detector",
    "build_trunk",
    "compare_heads",
    "efficient_sam3_config",
    "inherit",
    "list_students",
    "resolve_backbone",
]

_LATER = {
    "PyramidModel": ".pyramid", "EfficientSam3Model": ".sam3", "EfficientSam3Output": ".sam3",
    "build_detector": ".sam3", "inherit": ".sam3",
}  # fmt: skip
"""Names from modules that need transformers' SAM 3, which may be half imported when this is (``sam3_config``)."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)
