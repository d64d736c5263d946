"""MobileSAM: a timm trunk, SAM's neck, and transformers' SAM prompt encoder and mask decoder.

Any timm trunk and any input size are supported. EdgeSAM is one with a RepViT trunk, whose two deepest maps are summed.

Source:
    Zhang et al., Faster Segment Anything, 2023.
    Zhou et al., EdgeSAM: Prompt-In-the-Loop Distillation for On-Device Deployment of SAM, 2023.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from timm.models.repvit import RepVitDownsample
from timm.models.tiny_vit import PatchMerging
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, SamConfig, SamModel, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoderOutput, SamVisionNeck

from ..config import PromptableConfig
from ..types import UserError
from .backbones import build_backbone, feature_maps, levels, resolve_backbone, statistics
from .sam_host import assemble
from .trunk import StudentTrunk, StudentTrunkConfig, TimmModel, start_backbone


@strict
class MobileSamConfig(SamConfig):
    """Configuration of a ``MobileSamModel``. The defaults are the published MobileSAM.

    transformers' three sub-configurations follow from these fields and are not saved.

    Args:
        backbone: A student's name or a timm name. It is stored as the timm name.
        neck: ``last`` uses the trunk's deepest map, which must have one cell per patch. In a TinyViT the last
            downsampling then keeps the resolution, as in MobileSAM. ``fused`` combines all maps with a
            ``StudentTrunk``. ``summed`` adds the two deepest maps of a RepViT, as in EdgeSAM; the finer one must have
            one cell per patch. None is ``last`` for TinyViT and ``fused`` for others.
        image_size: Side of the square input in pixels.
        patch_size: Pixels per cell of the image embedding.
        width: Channels of the image embedding, the prompts and the decoder.
        heads: Attention heads of the decoder.
        image_mean, image_std: Normalisation of ``pixel_values``. None uses timm's values for the backbone. For TinyViT
            they are ImageNet's, as in SAM.

    Raises:
        UserError: The sizes are not compatible.

    Example:
        >>> samdistill.MobileSamConfig().neck
        'last'
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
        # SAM's two-way transformer has torch's epsilon, 1e-5. transformers' default is 1e-6.
        self.mask_decoder_config = {
            "hidden_size": self.width, "num_attention_heads": self.heads, "mlp_dim": 8 * self.width,
            "iou_head_hidden_dim": self.width, "layer_norm_eps": 1e-5,
        }  # fmt: skip
        super().__post_init__(**kwargs)
        # SAM's scale of the random Fourier features. With transformers' default, half the width, they are noise.
        self.vision_config.scale = 1

    def _check(self) -> None:
        if self.neck not in _TRUNKS:
            raise UserError(f"neck must be one of {', '.join(_TRUNKS)}, got {self.neck!r}")
        size, patch = self.image_size, self.patch_size
        if size % patch or size < patch:
            low = max(patch, size // patch * patch)
            raise UserError(f"image_size {size} is not a multiple of patch_size {patch}; use {low} or {low + patch}")
        if self.width % 8 or self.width // 2 % self.heads:
            raise UserError(
                f"width must be a multiple of 8, and width / 2 a multiple of heads, got width {self.width} and heads "
                f"{self.heads}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of this class, without the sub-configurations that follow from them."""
        return {name: value for name, value in super().to_dict().items() if name not in self.sub_configs}


class DeepestMap(nn.Module):
    """The deepest map of a timm backbone, with one cell per patch.

    Raises:
        UserError: The map has another stride than ``patch_size``.
    """

    def __init__(self, config: MobileSamConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone, config.image_size)
        level = levels(self.backbone)[-1]
        self.wanted, self.channels, stride = [level], level.channels, level.stride
        merging = [module for module in self.backbone.modules() if isinstance(module, PatchMerging)]
        if merging:
            merging[-1].conv2.conv.stride = (1, 1)
            stride //= 2
        _check_stride(config, stride, "its deepest map")

    def image_embedding(self, pixel_values: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d gh gw"]:
        """Return the deepest map, before SAM's neck."""
        return feature_maps(self.backbone, self.wanted, pixel_values)[0]


class SummedMaps(nn.Module):
    """The two deepest maps of a RepViT, projected to one width and added at one cell per patch, as in EdgeSAM.

    timm counts the last block of a stage as the first one of the next stage, so it runs once more for the finer map.

    Raises:
        UserError: The backbone is not a RepViT, or the finer one of the two maps has another stride than
            ``patch_size``.
    """

    def __init__(self, config: MobileSamConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone, config.image_size)
        self.wanted = levels(self.backbone)[-2:]
        blocks = [module.pre_block for module in self.backbone.modules() if isinstance(module, RepVitDownsample)]
        if not blocks:
            raise UserError(f"backbone {config.backbone!r} is not a RepViT, so neck cannot be summed; set it to fused")
        self._block = (blocks[-1],)  # in a tuple, so that no parameter has a second name
        _check_stride(config, self.wanted[0].stride, "its finer map")
        self.fine, self.coarse = (nn.Conv2d(level.channels, config.width, 1, bias=False) for level in self.wanted)

    def image_embedding(self, pixel_values: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d gh gw"]:
        """Return the sum, before SAM's neck."""
        fine, coarse = feature_maps(self.backbone, self.wanted, pixel_values)
        fine = self._block[0](fine)
        return self.fine(fine) + F.interpolate(self.coarse(coarse), fine.shape[-2:], mode="bicubic")


def _check_stride(config: MobileSamConfig, stride: int, which: str) -> None:
    if stride != config.patch_size:
        raise UserError(
            f"backbone {config.backbone!r} has {stride} px per cell in {which}, but patch_size is "
            f"{config.patch_size}: set patch_size to {stride} and image_size to a multiple of it, or neck to fused"
        )


class MobileSamEncoder(nn.Module):
    """Image encoder: trunk and SAM's neck."""

    def __init__(self, config: MobileSamConfig) -> None:
        super().__init__()
        self.trunk = _TRUNKS[config.neck or "fused"](config)
        channels = self.trunk.channels if config.neck == "last" else config.width
        self.neck = SamVisionNeck(SamVisionConfig(hidden_size=channels, output_channels=config.width))

    @property
    def backbone(self) -> nn.Module:
        """The timm network."""
        return self.trunk.backbone

    def forward(self, pixel_values: Float[Tensor, "b 3 s s"], **kwargs) -> SamVisionEncoderOutput:
        """Encode normalised images to the image embedding (b, width, gh, gw).

        ``SamModel`` passes further options to its ViT. This encoder has none and ignores them.
        """
        raw = self.trunk.image_embedding(pixel_values)
        return SamVisionEncoderOutput(last_hidden_state=self.neck(raw.permute(0, 2, 3, 1)))  # the neck takes NHWC


def _fused(config: MobileSamConfig) -> StudentTrunk:
    return StudentTrunk(StudentTrunkConfig(
        hidden_size=config.width, patch_size=config.patch_size, image_size=config.image_size, backbone=config.backbone,
        host_mean=config.image_mean, host_std=config.image_std,
    ))  # fmt: skip


_TRUNKS = {"last": DeepestMap, "fused": _fused, "summed": SummedMaps}


class MobileSamModel(TimmModel, SamModel):
    """``SamModel`` on a ``MobileSamEncoder``. Forward pass, prompts and masks are transformers'.

    Random weights are those of the original code (torch's defaults, unit variance for tokens and Fourier features).
    transformers' own initialisation is meant for fine-tuning. Image and prompts share one table of Fourier features.

    Args:
        config: Configuration of the model.

    Example:
        >>> model = samdistill.MobileSamModel(samdistill.MobileSamConfig(image_size=128)).eval()
        >>> points = torch.tensor([[[[64.0, 64.0]]]])  # image, object, point, x and y in pixels
        >>> model(torch.zeros(1, 3, 128, 128), input_points=points).pred_masks.shape
        torch.Size([1, 1, 3, 32, 32])
    """

    config_class = MobileSamConfig
    config: MobileSamConfig

    def __init__(self, config: MobileSamConfig) -> None:
        assemble(self, config, MobileSamEncoder(config))


def build_promptable(config: PromptableConfig) -> MobileSamModel:
    """Build a MobileSAM with random weights. The trunk can be pretrained.

    Args:
        config: Sizes and ``pretrained``. ``start`` is not used.

    Raises:
        UserError: The backbone is unknown or cannot run at ``image_size``, the sizes are not compatible, or the trunk's
            weights cannot be loaded.
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
AutoModelForMaskGeneration.register(MobileSamConfig, MobileSamModel)
