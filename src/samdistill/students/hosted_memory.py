"""Hosted students with a memory: a SAM 3 with a distilled trunk that remembers past frames, as Hugging Face models."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, Sam3Config, Sam3LiteTextConfig, Sam3LiteTextModel, Sam3Model

from ..types import UserError
from .remembering import Remembering
from .sam3 import EfficientSam3Model
from .sam3_config import EfficientSam3Config, MemoryFields

_NECK = "vision_encoder.neck.fpn_layers.3.proj2"


def _resize(config: Any, side: int) -> None:
    trunk = config.vision_config.backbone_config
    if side % trunk.patch_size:
        raise UserError(f"image size {side} is not a multiple of the patch size {trunk.patch_size}")
    trunk.image_size, grid = side, side // trunk.patch_size
    config.vision_config.backbone_feature_sizes = [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]


def _side(config: Any, level: int) -> int:
    """Return the side of a level of SAM 3's neck, whose third one has the grid of the trunk."""
    trunk = config.vision_config.backbone_config
    return int(trunk.image_size // trunk.patch_size * config.vision_config.scale_factors[level])


@strict
class HostedVideoConfig(MemoryFields, Sam3Config):
    """``Sam3Config`` of a hosted student, with the fields of its memory."""

    model_type = "samdistill_sam3_memory"

    def level_side(self, level: int) -> int:
        """Return the side in cells of a feature level."""
        return _side(self, level)

    def resize(self, side: int) -> None:
        """Set the side of the input in pixels. Raise ``UserError`` unless it is a multiple of the patch size."""
        _resize(self, side)


@strict
class HostedVideoLiteConfig(MemoryFields, Sam3LiteTextConfig):
    """``Sam3LiteTextConfig`` of a hosted student, with the fields of its memory."""

    model_type = "samdistill_sam3_lite_text_memory"

    def level_side(self, level: int) -> int:
        """Return the side in cells of a feature level."""
        return _side(self, level)

    def resize(self, side: int) -> None:
        """Set the side of the input in pixels. Raise ``UserError`` unless it is a multiple of the patch size."""
        _resize(self, side)


class HostedVideoModel(Remembering, Sam3Model):
    """A hosted student with SAM 3's own text encoder and a memory. Its interface is that of ``EfficientSam3Model``.

    Args:
        config: Configuration of the model.
    """

    config_class = HostedVideoConfig
    config: HostedVideoConfig
    coarsest = _NECK


class HostedVideoLiteModel(Remembering, Sam3LiteTextModel):
    """A hosted student with a small text encoder and a memory. Its interface is that of ``EfficientSam3Model``.

    Args:
        config: Configuration of the model.
    """

    config_class = HostedVideoLiteConfig
    config: HostedVideoLiteConfig
    coarsest = _NECK


VideoDetector = EfficientSam3Model | HostedVideoModel | HostedVideoLiteModel
"""Models that the video job trains a memory in."""
VIDEO_DETECTORS: dict[str, type[VideoDetector]] = {
    EfficientSam3Config.model_type: EfficientSam3Model, HostedVideoConfig.model_type: HostedVideoModel,
    HostedVideoLiteConfig.model_type: HostedVideoLiteModel,
}  # fmt: skip
"""The same by their model types."""
FROM_IMAGES = {
    EfficientSam3Config.model_type: EfficientSam3Config.model_type, Sam3Config.model_type: HostedVideoConfig.model_type,
    Sam3LiteTextConfig.model_type: HostedVideoLiteConfig.model_type,
}  # fmt: skip
"""Model type of the video student of each image student."""

for _config, _model in ((HostedVideoConfig, HostedVideoModel), (HostedVideoLiteConfig, HostedVideoLiteModel)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
