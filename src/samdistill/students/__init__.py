"""Students: timm backbones with heads as Hugging Face models.

Importing this package registers them with transformers.
"""

from __future__ import annotations

from .backbones import STUDENTS, resolve_backbone
from .catalogue import StudentInfo, breakdown, list_students
from .heads import HEADS, HeadCost, compare_heads
from .hosted import HostedStudent, host_trunk, hosted_config, without_dropout
from .hosted_memory import (
    FROM_IMAGES,
    VIDEO_DETECTORS,
    HostedVideoConfig,
    HostedVideoLiteConfig,
    HostedVideoLiteModel,
    HostedVideoModel,
    VideoDetector,
)
from .processor import ConceptProcessor
from .promptable import MobileSamConfig, MobileSamModel, build_promptable
from .pyramid import PyramidModel
from .remembering import MEMORY, EfficientSam3Output
from .sam2_host import HostedSam2VisionConfig, HostedSam2VisionModel, expansion, hosted_sam2_config
from .sam3 import EfficientSam3Model, build_detector, inherit
from .sam3_config import EfficientSam3Config, PyramidConfig, efficient_sam3_config
from .sam_host import HostedSamConfig, HostedSamModel
from .text import TEXT_SIZES, TEXT_STUDENT, TextStudent, TextStudentConfig, text_student_config
from .trunk import StudentTrunk, StudentTrunkConfig, TrunkOutput, build_trunk

__all__ = [
    "FROM_IMAGES",
    "HEADS",
    "MEMORY",
    "STUDENTS",
    "TEXT_SIZES",
    "TEXT_STUDENT",
    "VIDEO_DETECTORS",
    "ConceptProcessor",
    "EfficientSam3Config",
    "EfficientSam3Model",
    "EfficientSam3Output",
    "HeadCost",
    "HostedSam2VisionConfig",
    "HostedSam2VisionModel",
    "HostedSamConfig",
    "HostedSamModel",
    "HostedStudent",
    "HostedVideoConfig",
    "HostedVideoLiteConfig",
    "HostedVideoLiteModel",
    "HostedVideoModel",
    "MobileSamConfig",
    "MobileSamModel",
    "PyramidConfig",
    "PyramidModel",
    "StudentInfo",
    "StudentTrunk",
    "StudentTrunkConfig",
    "TextStudent",
    "TextStudentConfig",
    "TrunkOutput",
    "VideoDetector",
    "breakdown",
    "build_detector",
    "build_promptable",
    "build_trunk",
    "compare_heads",
    "efficient_sam3_config",
    "expansion",
    "host_trunk",
    "hosted_config",
    "hosted_sam2_config",
    "inherit",
    "list_students",
    "resolve_backbone",
    "text_student_config",
    "without_dropout",
]
