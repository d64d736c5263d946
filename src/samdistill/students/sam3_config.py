"""Configurations of the detection student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, Sam3LiteTextConfig

from .backbones import resolve_backbone, statistics


@strict
class PyramidConfig(PreTrainedConfig):
    """A timm backbone and one adapter per stride 4, 8, 16, 32 (``PyramidModel``).

    backbone: a student's name or a timm name (stored as the timm name). image_size: side of the square input; others
    work at run time unless the backbone is tied to one size. fpn_hidden_size: channels of every level.
    image_mean, image_std: how ``pixel_values`` arrive normalised; None takes the statistics timm records for the
    backbone. Nothing is converted inside: the caller normalises with them.
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
class EfficientSam3Config(Sam3LiteTextConfig):
    """``Sam3LiteTextConfig`` on a ``PyramidConfig``. Without arguments it is the described student (100.9M parameters);
    ``efficient_sam3_config`` gives other sizes.

    memory_latents: tokens that a video's past is kept in; 0 for a student of images, which has no memory modules.
    memory_layers: of the resampler. memory_windows: side of the grid of latents that look at one window each.
    memory_level: of the pyramid, 0 the finest. memory_marks: whether the memory was trained with masks of the object
    that is asked about. memory_context: the most frames it was trained with. memory_stride: frames of the video from
    one of them to the next. memory_phrase: what an object without a name is called. geometry: how training images lay
    on the canvas, ``square`` or ``longest_side``.
    """

    model_type = "efficient_sam3"

    memory_latents: int = 0
    memory_layers: int = 2
    memory_windows: int = 0
    memory_level: int = 3
    memory_marks: bool = True
    memory_context: int = 8
    memory_stride: int = 4
    memory_phrase: str = "object"
    geometry: str = "square"

    def __post_init__(self, **kwargs) -> None:
        for name, value in _parts().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if isinstance(self.vision_config, dict):
            self.vision_config = {"model_type": PyramidConfig.model_type, **self.vision_config}
        super().__post_init__(**kwargs)


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
    """The detection student: 100.9M parameters as it stands, of which vision 25.1M and text 61.4M.

    hidden_size, heads, ffn: width, attention heads and feed-forward width of everything behind the vision encoder.
    text: fields of the text encoder that differ from MobileCLIP-S1's (512 wide, 12 layers), such as ``vocab_size``.
    Dropout is off everywhere: the student regresses what a teacher answers, which is the same each time it is asked.
    The pixel decoder has the two stages that three levels use, where transformers' default of three leaves one idle.
    """
    sizes = (backbone, image_size, hidden_size, heads, ffn, encoder_layers, decoder_layers, queries)
    return EfficientSam3Config(**_parts(*sizes), text_config=dict(text or {}))


def _parts(
    backbone: str = "es_rv_l", image_size: int = 1008, hidden_size: int = 256, heads: int = 8, ffn: int = 1024,
    encoder_layers: int = 3, decoder_layers: int = 3, queries: int = 100,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The configuration of each part; arguments as of ``efficient_sam3_config``."""
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
