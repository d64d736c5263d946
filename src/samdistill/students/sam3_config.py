"""Configurations of the detection student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, Sam3LiteTextConfig

from .backbones import resolve_backbone, statistics

STRIDES = (4, 8, 16, 32)
"""Pixels per cell of the levels of a ``PyramidModel``."""


@strict
class PyramidConfig(PreTrainedConfig):
    """Configuration of a ``PyramidModel``: a timm backbone with an adapter for each of the strides 4, 8, 16 and 32.

    Args:
        backbone: A student's name or a timm name. It is stored as the timm name.
        image_size: Side of the square input in pixels. Other sizes work unless the backbone has a fixed size.
        fpn_hidden_size: Channels of every level.
        image_mean, image_std: Normalisation of ``pixel_values``, which the caller applies. None uses timm's values for
            the backbone.
    """

    model_type = "samdistill_pyramid"
    base_config_key = "vision_config"

    backbone: str = "repvit_m2_3"
    image_size: int = 1008
    fpn_hidden_size: int = 256
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None

    def __post_init__(self, **kwargs) -> None:
        self.backbone = resolve_backbone(self.backbone)
        mean, std = statistics(self.backbone)
        self.image_mean = list(mean if self.image_mean is None else self.image_mean)
        self.image_std = list(std if self.image_std is None else self.image_std)
        super().__post_init__(**kwargs)


@strict
class MemoryFields(PreTrainedConfig):
    """Fields of a detector that can have a memory.

    Args:
        memory_latents: Number of memory tokens of a video student. 0 means an image student without memory modules.
        memory_layers: Number of layers of the resampler.
        memory_windows: Side of the grid of latents that attend to one window each.
        memory_level: Feature level that the memory reads, 0 is the finest.
        memory_marks: Whether the memory was trained with masks of the object that a prompt refers to.
        memory_context: Largest number of past frames in training.
        memory_stride: Distance between two of these frames, in frames of the video.
        memory_phrase: Text prompt for an object without a name.
        geometry: Placement of the training images on the canvas, ``square`` or ``longest_side``.
    """

    memory_latents: int = 0
    memory_layers: int = 2
    memory_windows: int = 0
    memory_level: int = 3
    memory_marks: bool = True
    memory_context: int = 8
    memory_stride: int = 4
    memory_phrase: str = "object"
    geometry: str = "square"


@strict
class EfficientSam3Config(MemoryFields, Sam3LiteTextConfig):
    """``Sam3LiteTextConfig`` with a ``PyramidConfig``. The defaults have 100.9M parameters.

    The defaults are the student of the published description. ``efficient_sam3_config`` builds other sizes. The fields
    of the memory are those of ``MemoryFields``.

    Example:
        >>> samdistill.EfficientSam3Config().detr_decoder_config.num_queries
        100
    """

    model_type = "efficient_sam3"

    def __post_init__(self, **kwargs) -> None:
        for name, value in _parts().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if isinstance(self.vision_config, dict):
            self.vision_config = {"model_type": PyramidConfig.model_type, **self.vision_config}
        super().__post_init__(**kwargs)

    def level_side(self, level: int) -> int:
        """Return the side in cells of a feature level."""
        return -(-self.vision_config.image_size // STRIDES[level])

    def resize(self, side: int) -> None:
        """Set the side of the input in pixels."""
        self.vision_config.image_size = side


def efficient_sam3_config(
    backbone: str = "es_rv_l",
    image_size: int = 1008,
    hidden_size: int = 256,
    heads: int = 8,
    ffn: int = 1024,
    encoder_layers: int = 3,
    decoder_layers: int = 3,
    queries: int = 100,
    text: Mapping[str, int] | None = None,
) -> EfficientSam3Config:
    """Build the configuration of a detection student.

    The defaults have 100.9M parameters: vision 25.1M, text 61.4M. There is no dropout, because the student regresses
    deterministic targets. The pixel decoder has the two stages that three levels use. transformers' default of three
    would leave one unused.

    Args:
        backbone: A student's name or a timm name.
        image_size: Side of the square input in pixels.
        hidden_size: Width of all modules after the vision encoder.
        heads: Attention heads of these modules.
        ffn: Feed-forward width of these modules.
        encoder_layers: Layers of the DETR encoder.
        decoder_layers: Layers of the DETR decoder.
        queries: Number of object queries.
        text: Fields of the text encoder that differ from MobileCLIP-S1's (512 wide, 12 layers), such as ``vocab_size``.

    Example:
        >>> model = build_detector(efficient_sam3_config("es_ev_s", queries=50))
    """
    sizes = (backbone, image_size, hidden_size, heads, ffn, encoder_layers, decoder_layers, queries)
    return EfficientSam3Config(**_parts(*sizes), text_config=dict(text or {}))


def _parts(
    backbone: str = "es_rv_l", image_size: int = 1008, hidden_size: int = 256, heads: int = 8, ffn: int = 1024,
    encoder_layers: int = 3, decoder_layers: int = 3, queries: int = 100,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return the configuration of each part. The arguments are those of ``efficient_sam3_config``."""
    shared = {"hidden_size": hidden_size, "num_attention_heads": heads}
    layer = {**shared, "intermediate_size": ffn, "dropout": 0.0}
    return {
        "vision_config": {
            "model_type": PyramidConfig.model_type, "backbone": backbone, "image_size": image_size,
            "fpn_hidden_size": hidden_size,
        },
        "geometry_encoder_config": {**layer, "num_layers": 1},
        "detr_encoder_config": {**layer, "num_layers": encoder_layers},
        "detr_decoder_config": {**layer, "num_layers": decoder_layers, "num_queries": queries},
        "mask_decoder_config": {**shared, "num_upsampling_stages": 2},
    }  # fmt: skip


AutoConfig.register(PyramidConfig.model_type, PyramidConfig)
AutoConfig.register(EfficientSam3Config.model_type, EfficientSam3Config)
