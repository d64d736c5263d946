"""SAM with a distilled trunk in the place of its image encoder, as a Hugging Face model."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, PreTrainedConfig, SamConfig, SamModel
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamPositionalEmbedding,
    SamPromptEncoder,
    SamVisionEncoderOutput,
)

from .trunk import StudentTrunk, StudentTrunkConfig, built


@strict
class HostedSamVisionConfig(PreTrainedConfig):
    """Configuration of the image encoder of a ``HostedSamModel``.

    Args:
        backbone_config: Configuration of the trunk. Its embedding is the output of SAM's neck.
        num_pos_feats: Half of the channels of the random Fourier features.
        scale: Standard deviation of random Fourier features. Those of a checkpoint replace them.

    Example:
        >>> HostedSamVisionConfig(backbone_config=StudentTrunkConfig(patch_size=16, image_size=1024)).num_pos_feats
        128
    """

    model_type = "samdistill_sam_vision"
    base_config_key = "vision_config"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": StudentTrunkConfig}

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    num_pos_feats: int = 128
    scale: float = 1.0

    def __post_init__(self, **kwargs) -> None:
        self.backbone_config = built(self.backbone_config, StudentTrunkConfig)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and the depth of the ViT as null, so that ``SamModel`` refuses to build one."""
        return super().to_dict() | {"num_hidden_layers": None}


@strict
class HostedSamConfig(SamConfig):
    """Configuration of a ``HostedSamModel``: that of a SAM, with another image encoder.

    Args:
        vision_config: A ``HostedSamVisionConfig`` or its fields.
        prompt_encoder_config, mask_decoder_config: As in ``SamConfig``.

    Example:
        >>> HostedSamConfig().vision_config.backbone_config.backbone
        'repvit_m1_1'
    """

    model_type = "samdistill_sam"
    sub_configs: ClassVar[dict[str, Any]] = {**SamConfig.sub_configs, "vision_config": HostedSamVisionConfig}

    def __post_init__(self, **kwargs) -> None:
        self.vision_config = built(self.vision_config, HostedSamVisionConfig)
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, host: SamConfig, trunk: StudentTrunkConfig) -> HostedSamConfig:
        """Return the configuration of ``host`` with ``trunk`` as its image encoder."""
        vision = HostedSamVisionConfig(
            backbone_config=trunk.to_dict(), num_pos_feats=host.vision_config.num_pos_feats,
            scale=host.vision_config.scale,
        )  # fmt: skip
        prompts, masks = host.prompt_encoder_config.to_dict(), host.mask_decoder_config.to_dict()
        return cls(vision_config=vision.to_dict(), prompt_encoder_config=prompts, mask_decoder_config=masks)


class TrunkEncoder(nn.Module):
    """A trunk with the interface of SAM's image encoder."""

    def __init__(self, trunk: StudentTrunk) -> None:
        super().__init__()
        self.backbone = trunk

    def get_input_embeddings(self) -> None:  # called by the host; images have no token embeddings
        return None

    def forward(self, pixel_values: Float[Tensor, "b 3 s s"], **kwargs) -> SamVisionEncoderOutput:
        """Encode normalised images to the image embedding (b, c, gh, gw).

        ``SamModel`` passes further options to its ViT. This encoder has none and ignores them.
        """
        return SamVisionEncoderOutput(last_hidden_state=self.backbone.image_embedding(pixel_values))


class HostedSamModel(SamModel):
    """``SamModel`` on a distilled trunk. Forward pass, prompt encoder and mask decoder are transformers'.

    ``SamModel`` builds its ViT itself and cannot host another encoder, so this is a class of its own.
    ``AutoModel.from_pretrained`` opens it.

    Args:
        config: Configuration of the model.

    Example:
        >>> trunk = StudentTrunkConfig(backbone="es_ev_s", hidden_size=256, patch_size=16, image_size=128)
        >>> config = HostedSamConfig(vision_config={"backbone_config": trunk.to_dict()})
        >>> config.prompt_encoder_config.image_size, config.prompt_encoder_config.image_embedding_size = 128, 8
        >>> HostedSamModel(config).eval().get_image_embeddings(torch.zeros(1, 3, 128, 128)).shape
        torch.Size([1, 256, 8, 8])
    """

    config_class = HostedSamConfig
    config: HostedSamConfig

    def __init__(self, config: HostedSamConfig) -> None:
        assemble(self, config, TrunkEncoder(StudentTrunk(config.vision_config.backbone_config)))

    @classmethod
    def of(cls, host: SamModel, trunk: StudentTrunk) -> HostedSamModel:
        """Return ``host`` with ``trunk`` as its image encoder. Prompt encoder and mask decoder are shared with it."""
        model = cls(HostedSamConfig.of(host.config, trunk.config))
        model.vision_encoder = TrunkEncoder(trunk)
        for part in ("shared_image_embedding", "prompt_encoder", "mask_decoder"):
            setattr(model, part, getattr(host, part))
        return model.train(host.training)


def assemble(model: Any, config: Any, encoder: nn.Module) -> None:
    """Initialise a subclass of ``SamModel`` with another image encoder.

    Args:
        model: The subclass' instance, in its constructor.
        config: Its configuration.
        encoder: Returns the image embedding in ``last_hidden_state``.
    """
    super(SamModel, model).__init__(config)  # skips SamModel.__init__, which would build a ViT
    model.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
    model.vision_encoder = encoder
    model.prompt_encoder = SamPromptEncoder(config)
    config.mask_decoder_config._attn_implementation = config._attn_implementation
    model.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
    model.post_init()


AutoConfig.register(HostedSamConfig.model_type, HostedSamConfig)
AutoModel.register(HostedSamConfig, HostedSamModel)
AutoModelForMaskGeneration.register(HostedSamConfig, HostedSamModel)
