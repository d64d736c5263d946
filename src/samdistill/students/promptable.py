"""MobileSAM: a timm trunk, SAM's neck, and transformers' SAM prompt encoder and mask decoder.

Zhang et al., "Faster Segment Anything" (2023), with any timm trunk and at any size.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from timm.models.tiny_vit import PatchMerging
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, SamConfig, SamModel, SamVisionConfig
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamPositionalEmbedding,
    SamPromptEncoder,
    SamVisionEncoderOutput,
    SamVisionNeck,
)

from ..config import PromptableConfig
from ..types import UserError
from .backbones import build_backbone, feature_maps, levels, resolve_backbone, statistics
from .trunk import StudentTrunk, StudentTrunkConfig, TimmModel, start_backbone

NECKS = ("last", "fused")


@strict
class MobileSamConfig(SamConfig):
    """A MobileSAM; the defaults are the published one.

    backbone: a student's name or a timm name (stored as the timm name). neck: ``last`` takes the trunk's deepest map,
    which has to have one cell per patch, and in a TinyViT the last downsampling then keeps the resolution, as in
    MobileSAM; ``fused`` brings all maps to the grid with a ``StudentTrunk``; None is ``last`` for TinyViT, else
    ``fused``. image_size: side of the square input. patch_size: pixels per cell of the image embedding. width: channels
    of the image embedding, the prompts and the decoder. heads: of the decoder's attention.
    image_mean, image_std: how ``pixel_values`` arrive normalised; None takes the statistics timm records for the
    backbone, which for TinyViT are ImageNet's, as SAM has them.

    What transformers keeps in three sub-configurations follows from these fields and is not saved beside them.
    Raises ``UserError`` where the sizes do not go together.
    """

    model_type = "samdistill_mobile_sam"

    backbone: str = "tiny_vit_5m_224"
    neck: str | None = None
    image_size: int = 1024
    patch_size: int = 16
    width: int = 256
    heads: int = 8
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None

    def __post_init__(self, **kwargs) -> None:
        self.backbone = resolve_backbone(self.backbone)
        self.neck = self.neck or ("last" if self.backbone.startswith("tiny_vit") else "fused")
        self._check()
        mean, std = statistics(self.backbone)
        self.image_mean = list(mean if self.image_mean is None else self.image_mean)
        self.image_std = list(std if self.image_std is None else self.image_std)
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size}
        self.vision_config = {**sizes, "output_channels": self.width, "num_pos_feats": self.width // 2}
        self.prompt_encoder_config = {**sizes, "hidden_size": self.width}
        # SAM's code and weights have torch's 1e-5 in the two-way transformer, transformers' default is 1e-6
        self.mask_decoder_config = {
            "hidden_size": self.width, "num_attention_heads": self.heads, "mlp_dim": 8 * self.width,
            "iou_head_hidden_dim": self.width, "layer_norm_eps": 1e-5,
        }  # fmt: skip
        super().__post_init__(**kwargs)
        self.vision_config.scale = 1  # of the random Fourier features, as in SAM; transformers' half width is noise

    def _check(self) -> None:
        if self.neck not in NECKS:
            raise UserError(f"neck {self.neck!r}: there is {' and '.join(NECKS)}")
        size, patch = self.image_size, self.patch_size
        if size % patch or size < patch:
            low = max(patch, size // patch * patch)
            raise UserError(f"image_size {size} is not a multiple of patch_size {patch}; use {low} or {low + patch}")
        if self.width % 8 or self.width // 2 % self.heads:
            raise UserError(
                f"width {self.width} with {self.heads} heads: the width has to be a multiple of 8, and its half one of "
                "the heads"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields of this class; what follows from them is left out."""
        return {name: value for name, value in super().to_dict().items() if name not in self.sub_configs}


class DeepestMap(nn.Module):
    """A timm backbone's deepest map, which has one cell per patch. Raises ``UserError`` where it has not."""

    def __init__(self, config: MobileSamConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone, config.image_size)
        level = levels(self.backbone)[-1]
        self.wanted, self.channels, stride = [level], level.channels, level.stride
        merging = [module for module in self.backbone.modules() if isinstance(module, PatchMerging)]
        if merging:
            merging[-1].conv2.conv.stride = (1, 1)
            stride //= 2
        if stride != config.patch_size:
            raise UserError(
                f"backbone {config.backbone!r} has {stride} px per cell in its deepest map, but patch_size is "
                f"{config.patch_size}: set patch_size to {stride} and image_size to a multiple of it, or neck to fused"
            )

    def image_embedding(self, pixel_values: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d gh gw"]:
        return feature_maps(self.backbone, self.wanted, pixel_values)[0]


class MobileSamEncoder(nn.Module):
    """``pixel_values`` (b, 3, s, s) to the image embedding (b, width, gh, gw): trunk, then SAM's neck."""

    def __init__(self, config: MobileSamConfig) -> None:
        super().__init__()
        self.trunk = DeepestMap(config) if config.neck == "last" else StudentTrunk(_fused(config))
        channels = self.trunk.channels if config.neck == "last" else config.width
        self.neck = SamVisionNeck(SamVisionConfig(hidden_size=channels, output_channels=config.width))

    @property
    def backbone(self) -> nn.Module:
        """The timm network."""
        return self.trunk.backbone

    def forward(self, pixel_values: Float[Tensor, "b 3 s s"], **kwargs) -> SamVisionEncoderOutput:
        """``SamModel`` passes further options on to its ViT; this encoder has none."""
        raw = self.trunk.image_embedding(pixel_values)
        return SamVisionEncoderOutput(last_hidden_state=self.neck(raw.permute(0, 2, 3, 1)))  # channels last, as a ViT's


def _fused(config: MobileSamConfig) -> StudentTrunkConfig:
    return StudentTrunkConfig(
        hidden_size=config.width, patch_size=config.patch_size, image_size=config.image_size, backbone=config.backbone,
        host_mean=config.image_mean, host_std=config.image_std,
    )  # fmt: skip


class MobileSamModel(TimmModel, SamModel):
    """A ``SamModel`` on a ``MobileSamEncoder``: forward, prompts and masks are transformers' own.

    Random weights are those of the original's code (torch's defaults, unit variance for tokens and Fourier features),
    not transformers', which are meant for fine-tuning. Image and prompts share one table of Fourier features.
    """

    config_class = MobileSamConfig
    config: MobileSamConfig

    def __init__(self, config: MobileSamConfig) -> None:
        super(SamModel, self).__init__(config)  # past SamModel's own, which builds a ViT
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
        self.vision_encoder = MobileSamEncoder(config)
        self.prompt_encoder = SamPromptEncoder(config)
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self.post_init()


def build_promptable(config: PromptableConfig) -> MobileSamModel:
    """A MobileSAM with random weights in all but what ``config.pretrained`` gives its trunk; ``start`` is not read.

    Raises ``UserError`` for an unknown backbone, sizes that do not go together, a backbone that cannot run at
    ``image_size``, and trunk weights that cannot be had or do not fit.
    """
    model = MobileSamModel(
        MobileSamConfig(
            backbone=config.backbone, neck=config.neck, image_size=config.image_size, patch_size=config.patch_size,
            width=config.width, heads=config.heads,
        )
    )  # fmt: skip
    start_backbone(model.vision_encoder.backbone, model.config.backbone, config.image_size, config.pretrained)
    return model


AutoConfig.register(MobileSamConfig.model_type, MobileSamConfig)
AutoModel.register(MobileSamConfig, MobileSamModel)
