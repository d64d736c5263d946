"""The detection student's vision encoder: a timm backbone and a feature pyramid, in the form SAM 3's heads read."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import (
    Sam3LiteTextSinePositionEmbedding,
    Sam3LiteTextVisionEncoderOutput,
)

from ..types import UserError
from .backbones import build_backbone, feature_maps, levels
from .sam3_config import PyramidConfig
from .trunk import TimmModel

STRIDES = (4, 8, 16, 32)


class Adapter(nn.Module):
    """Conv1x1-BN, the coarser levels added, ReLU-Conv3x3-BN: to the pyramid's width.

    The description has the convolutions and no way from coarse to fine: a map of stride 4 then has to say by itself
    what an object is, which it is too near to see, and the backbone's last stage is unused. The sum costs no
    parameter (Lin et al., Feature Pyramid Networks, 2017). The description ends in one more ReLU, which is left out:
    the levels are regressed onto the teacher's, and those are signed.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lateral = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.smooth = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(
        self, x: Float[Tensor, "b _ h w"], coarser: Float[Tensor, "b c _ _"] | None
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """The level, and what the next finer one adds to its own."""
        summed = self.lateral(x)
        if coarser is not None:
            summed = summed + F.interpolate(coarser, summed.shape[-2:], mode="bilinear", align_corners=False)
        return self.smooth(summed), summed


class PyramidModel(TimmModel):
    """``pixel_values`` (b, 3, h, w), normalised with the configuration's statistics, to four levels, finest first.

    At 1008 px they are 252, 126, 63 and 32 wide, at 504 px 126, 63, 32 and 16: ceil(h / stride). SAM 3's detector
    reads the first three; the last one is for video, and its 3x3 convolution learns nothing before.
    Raises ``UserError`` for a backbone without these four strides.
    """

    config_class = PyramidConfig
    config: PyramidConfig

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone, config.image_size)
        self.levels = levels(self.backbone)
        strides = tuple(level.stride for level in self.levels)
        if strides != STRIDES:
            has = ", ".join(map(str, strides)) or "none from 4 on"
            raise UserError(f"backbone {config.backbone!r} has strides {has}; a pyramid needs 4, 8, 16 and 32")
        width = config.fpn_hidden_size
        self.adapters = nn.ModuleList(Adapter(level.channels, width) for level in self.levels)
        self.position_encoding = Sam3LiteTextSinePositionEmbedding(num_position_features=width // 2, normalize=True)
        self.post_init()

    def forward(self, pixel_values: Float[Tensor, "b 3 h w"], **kwargs) -> Sam3LiteTextVisionEncoderOutput:
        """The levels and their sine positions. ``last_hidden_state``: the coarsest as tokens in row-major order.

        Hosts pass further options on to their vision encoder; it has none.
        """
        maps = feature_maps(self.backbone, self.levels, pixel_values.to(self.dtype))
        pyramid, coarser = [], None
        for adapter, x in zip(reversed(self.adapters), reversed(maps), strict=True):
            level, coarser = adapter(x, coarser)
            pyramid.insert(0, level)
        return Sam3LiteTextVisionEncoderOutput(
            last_hidden_state=pyramid[-1].flatten(2).transpose(1, 2),
            fpn_hidden_states=tuple(pyramid),
            fpn_position_encoding=tuple(self._positions(level) for level in pyramid),
        )

    def _positions(self, level: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Computed for one image: transformers keeps the last few tables alive, and they do not depend on the image."""
        table = self.position_encoding((1, *level.shape[1:]), level.device, level.dtype)
        return table.expand(len(level), -1, -1, -1)


AutoModel.register(PyramidConfig, PyramidModel)
