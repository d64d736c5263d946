"""Hosted student: a SAM 3 whose ViT is replaced by a small trunk. Its neck, text encoder and heads are the host's."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import singledispatch
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Sam2Model, SamModel

from ..ops.outputs import ask, trunk_map
from .remembering import EfficientSam3Output
from .sam2_host import HostedSam2VisionModel, expansion, hosted_sam2_config
from .sam_host import HostedSamModel
from .trunk import StudentTrunk, StudentTrunkConfig

_DROPOUT = ("dropout", "hidden_dropout", "attention_dropout")


def without_dropout(host: PreTrainedConfig) -> Any:
    """Return a copy of the configuration of a SAM 3 without dropout.

    The student regresses deterministic targets through modules that do not change.
    """
    found: Any = copy.deepcopy(host)
    for part in (getattr(found, name) for name in found.sub_configs):
        for key in _DROPOUT:
            if hasattr(part, key):
                setattr(part, key, 0.0)
    return found


def hosted_config(host: PreTrainedConfig, trunk: StudentTrunkConfig) -> Any:
    """Return a copy of the configuration of ``host`` with ``trunk`` in the place of its ViT.

    Args:
        host: Configuration of a ``Sam3Model`` or ``Sam3LiteTextModel``.
        trunk: Configuration of the trunk, with the channels and the patch size of the ViT.
    """
    found: Any = copy.deepcopy(host)
    grid = trunk.image_size // trunk.patch_size
    found.vision_config.backbone_config = trunk
    found.vision_config.backbone_feature_sizes = [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]
    return found


@singledispatch
def host_trunk(host: PreTrainedModel, trunk: StudentTrunk) -> Any:
    """Replace the image encoder of ``host`` by ``trunk``. All other tensors stay as they are.

    Args:
        host: A ``Sam3Model``, ``Sam3LiteTextModel``, ``Sam3TrackerModel`` or ``Sam2Model``, which is changed in place,
            or a ``SamModel``.
        trunk: The trunk, see ``hosted_config``.

    Returns:
        ``host``, or for a ``SamModel`` a ``HostedSamModel`` that shares its other modules.

    Example:
        >>> host_trunk(Sam3Model.from_pretrained("facebook/sam3"), build_trunk(StudentTrunkConfig("es_rv_m")))
    """
    model: Any = host
    model.config = hosted_config(model.config, trunk.config)
    model.vision_encoder.config = model.config.vision_config
    model.vision_encoder.backbone = trunk
    return model


@host_trunk.register(SamModel)
def _host_in_sam(host: SamModel, trunk: StudentTrunk) -> HostedSamModel:
    return HostedSamModel.of(host, trunk)


@host_trunk.register(Sam2Model)
def _host_in_sam2(host: Sam2Model, trunk: StudentTrunk) -> Sam2Model:
    host.config = hosted_sam2_config(host.config, trunk.config)
    encoder = HostedSam2VisionModel(host.config.vision_config)
    encoder.backbone = trunk
    for grow, conv in zip(encoder.expand, (host.mask_decoder.conv_s0, host.mask_decoder.conv_s1), strict=True):
        weight, bias = expansion(conv.weight, conv.bias)
        grow.load_state_dict({"weight": weight, "bias": bias})
    host.vision_encoder = encoder.train(host.training)
    return host


class HostedStudent(nn.Module):
    """A hosted model in training: one call encodes b images and answers p questions about them.

    Its modules, and so the names of its parameters, are those of the model.

    Args:
        model: A ``Sam3Model`` or ``Sam3LiteTextModel``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._whole = (model,)  # in a tuple, so that no parameter has a second name
        for name, module in model.named_children():
            self.add_module(name, module)

    @property
    def model(self) -> Any:
        """The hosted model, which is saved and exported."""
        return self._whole[0]

    def forward(
        self,
        pixel_values: Float[Tensor, "b 3 h w"],
        input_ids: Int[Tensor, "p t"] | None = None,
        attention_mask: Int[Tensor, "p t"] | None = None,
        input_boxes: Float[Tensor, "p k 4"] | None = None,
        input_boxes_labels: Int[Tensor, "p k"] | None = None,
        prompt_images: Int[Tensor, " p"] | None = None,
        text_features: Float[Tensor, "p t c"] | None = None,
        trunk_only: bool = False,
    ) -> EfficientSam3Output:
        """Detect the instances of p prompts on b images. Without text the result has only the images' features.

        Args:
            pixel_values: Images, normalised for the host (0.5 and 0.5).
            input_ids: Token ids.
            attention_mask: 1 for tokens, 0 for padding.
            input_boxes: Exemplar boxes, normalised cxcywh.
            input_boxes_labels: 1 for positive exemplars, 0 for negative ones, -10 for padding.
            prompt_images: Index of the image of each prompt. None means one prompt per image.
            text_features: Projected text features of ``input_ids``, if they are known: the text encoder does not run.
            trunk_only: Run only the trunk.
        """
        if trunk_only:
            return EfficientSam3Output(trunk=self.model.vision_encoder.backbone.image_embedding(pixel_values))
        vision = self.model.get_vision_features(pixel_values)
        if input_ids is None:
            return EfficientSam3Output(fpn_hidden_states=vision.fpn_hidden_states[:-1])
        text = text_features
        if text is None:
            text = self.model.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output
        boxes = None if input_boxes is None else input_boxes.to(self.model.dtype)
        found = ask(self.model, vision, prompt_images, text, attention_mask, boxes, input_boxes_labels)
        return EfficientSam3Output.of(replace(found, trunk=trunk_map(vision)))
