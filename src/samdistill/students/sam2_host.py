"""Image encoder of a SAM 2 that hosts a distilled trunk, as a Hugging Face model.

``Sam2Model`` and ``Sam2VideoModel`` build their image encoder from its configuration and host this one unchanged.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.sam2.modeling_sam2 import Sam2SinePositionEmbedding, Sam2VisionEncoderOutput

from .trunk import StudentTrunk, StudentTrunkConfig, built


@strict
class HostedSam2VisionConfig(PreTrainedConfig):
    """Configuration of a ``HostedSam2VisionModel``.

    Args:
        backbone_config: Configuration of the trunk, with two ``fine_channels``.
        fpn_hidden_size: Channels of all levels that the host reads.

    Attributes:
        backbone_feature_sizes: Height and width of the levels in cells, finest first.
        num_feature_levels: Number of levels.

    Example:
        >>> trunk = StudentTrunkConfig(hidden_size=256, patch_size=16, image_size=1024, fine_channels=(32, 64))
        >>> HostedSam2VisionConfig(backbone_config=trunk.to_dict()).backbone_feature_sizes
        [[256, 256], [128, 128], [64, 64]]
    """

    model_type = "samdistill_sam2_vision"
    base_config_key = "vision_config"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": StudentTrunkConfig}

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    backbone_feature_sizes: list[list[int]] | None = None
    fpn_hidden_size: int = 256
    num_feature_levels: int = 3

    def __post_init__(self, **kwargs) -> None:
        self.backbone_config = built(self.backbone_config, StudentTrunkConfig)
        super().__post_init__(**kwargs)
        trunk = self.backbone_config
        assert isinstance(trunk, StudentTrunkConfig)
        grid = trunk.image_size // trunk.patch_size
        self.num_feature_levels = 1 + len(trunk.fine_channels)
        self.backbone_feature_sizes = [[grid * 2**n] * 2 for n in reversed(range(self.num_feature_levels))]


class HostedSam2VisionModel(PreTrainedModel):
    """A trunk with the interface of SAM 2's image encoder.

    The mask decoder of a SAM 2 projects the fine levels to few channels (``conv_s0``, ``conv_s1``). The trunk predicts
    these projections. ``expand`` maps them to levels whose projections they are, so the host's decoder does not change.

    Args:
        config: Configuration of the encoder.

    Example:
        >>> trunk = StudentTrunkConfig(
        ...     backbone="es_ev_s", hidden_size=256, patch_size=16, image_size=128, fine_channels=(32, 64))
        >>> encoder = HostedSam2VisionModel(HostedSam2VisionConfig(backbone_config=trunk.to_dict())).eval()
        >>> [tuple(level.shape) for level in encoder(torch.zeros(1, 3, 128, 128)).fpn_hidden_states]
        [(1, 256, 32, 32), (1, 256, 16, 16), (1, 256, 8, 8)]
    """

    config_class = HostedSam2VisionConfig
    config: HostedSam2VisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True

    def __init__(self, config: HostedSam2VisionConfig) -> None:
        super().__init__(config)
        trunk = config.backbone_config
        assert isinstance(trunk, StudentTrunkConfig)
        self.backbone = StudentTrunk(trunk)
        self.expand = nn.ModuleList(nn.Conv2d(c, config.fpn_hidden_size, 1) for c in trunk.fine_channels)
        self.position_encoding = Sam2SinePositionEmbedding(config.fpn_hidden_size // 2, normalize=True)
        self.post_init()

    def get_input_embeddings(self) -> None:  # called by hosts; images have no token embeddings
        return None

    def forward(self, pixel_values: Float[Tensor, "b 3 s s"], **kwargs) -> Sam2VisionEncoderOutput:
        """Encode normalised images.

        Hosts pass further options to their image encoder. This one has none and ignores them.

        Args:
            pixel_values: Images, normalised for the host.

        Returns:
            ``fpn_hidden_states``: the levels, finest first, each (b, fpn_hidden_size, h, w). The last one is the image
            embedding, which is ``last_hidden_state`` too.
        """
        *fine, embedding = self.backbone.image_levels(pixel_values)
        levels = (*(grow(level) for grow, level in zip(self.expand, fine, strict=True)), embedding)
        positions = tuple(self.position_encoding(level.shape, level.device, level.dtype) for level in levels)
        return Sam2VisionEncoderOutput(
            last_hidden_state=embedding, fpn_hidden_states=levels, fpn_position_encoding=positions
        )


def hosted_sam2_config(host: Any, trunk: StudentTrunkConfig) -> Any:
    """Return the configuration of ``host``, a ``Sam2Config`` or ``Sam2VideoConfig``, with ``trunk`` as its encoder."""
    vision = HostedSam2VisionConfig(backbone_config=trunk.to_dict(), fpn_hidden_size=host.vision_config.fpn_hidden_size)
    return type(host).from_dict({**host.to_dict(), "vision_config": vision.to_dict()})


@torch.no_grad()
def expansion(
    weight: Float[Tensor, "c d 1 1"], bias: Float[Tensor, " c"]
) -> tuple[Float[Tensor, "d c 1 1"], Float[Tensor, " d"]]:
    """Return weight and bias of the convolution that a 1x1 convolution (``weight``, ``bias``) inverts.

    ``conv(expand(x)) = x`` for every x. Of all such convolutions this is the one with the smallest weights.

    Raises:
        ValueError: The rows of ``weight`` are linearly dependent, so there is none.
    """
    matrix = weight.flatten(1).double()
    inverse = torch.linalg.pinv(matrix)
    if not torch.allclose(matrix @ inverse, torch.eye(len(matrix), dtype=matrix.dtype), atol=1e-6):
        raise ValueError("the rows of its weight are linearly dependent")
    shift = -(inverse @ bias.double())
    return inverse.float()[..., None, None].contiguous(), shift.float()


AutoConfig.register(HostedSam2VisionConfig.model_type, HostedSam2VisionConfig)
AutoModel.register(HostedSam2VisionConfig, HostedSam2VisionModel)
