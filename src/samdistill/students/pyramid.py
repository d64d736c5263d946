"""Vision encoder of the detection student: a timm backbone and a feature pyramid in the format of SAM 3's heads."""

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
from .sam3_config import STRIDES, PyramidConfig
from .trunk import TimmModel


class Adapter(nn.Module):
    """Adapter of one level to the pyramid's width: Conv1x1-BN, plus the coarser level, then ReLU-Conv3x3-BN.

    The published description has only the convolutions. A map of stride 4 would then have to classify objects with a
    small receptive field, and the backbone's last stage would be unused. Adding the coarser level needs no parameters
    (Lin et al., Feature Pyramid Networks, 2017). The description's final ReLU is omitted, because the levels are
    regressed onto the teacher's, which are signed.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lateral = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.smooth = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(
        self, x: Float[Tensor, "b _ h w"], coarser: Float[Tensor, "b c _ _"] | None
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Return the level, and the sum that the next finer level adds to its own.

        Args:
            x: Map of the backbone.
            coarser: Second result of the next coarser level, of any size. None for the coarsest level.
        """
        summed = self.lateral(x)
        if coarser is not None:
            summed = summed + F.interpolate(coarser, summed.shape[-2:], mode="bilinear", align_corners=False)
        return self.smooth(summed), summed


class PyramidModel(TimmModel):
    """Feature pyramid with four levels of strides 4, 8, 16 and 32, finest first.

    The sides are ceil(h / stride): 252, 126, 63 and 32 at 1008 px; 126, 63, 32 and 16 at 504 px. SAM 3's detector reads
    the first three levels. The last one is for video, and its 3x3 convolution is not trained before.

    Raises:
        UserError: The backbone does not have these four strides.
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
        """Return the levels and their sine position embeddings.

        Hosts pass further options to their vision encoder. This one has none and ignores them.

        Args:
            pixel_values: Images, normalised with the configuration's statistics.

        Returns:
            ``fpn_hidden_states`` and ``fpn_position_encoding``, finest first, each (b, c, ceil(h / stride), ceil(w /
            stride)), and ``last_hidden_state``, the coarsest level as tokens in row-major order.
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
        """Return the position embeddings of a level.

        They are computed for one image and expanded, because they do not depend on the image and transformers caches
        the last few tables.
        """
        table = self.position_encoding((1, *level.shape[1:]), level.device, level.dtype)
        return table.expand(level.shape[0], -1, -1, -1)


AutoModel.register(PyramidConfig, PyramidModel)
