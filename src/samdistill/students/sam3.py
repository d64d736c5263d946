"""The detection student: transformers' SAM 3 with a small text encoder, on a pyramid and with shallower heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModel, Sam3LiteTextModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextVisionEncoderOutput
from transformers.utils import ModelOutput

from ..ops.outputs import ask
from ..types import DetectorOutput
from .memory import LATENT_STD, MemoryCrossAttention, PerceiverResampler
from .pyramid import PyramidModel
from .sam3_config import EfficientSam3Config
from .trunk import start_backbone

INHERITED = (
    "text_projection",
    "geometry_encoder",
    "detr_encoder",
    "detr_decoder",
    "mask_decoder",
    "dot_product_scoring",
)
"""Modules that a student may inherit from its teacher."""
MEMORY = ("memory_resampler.", "memory_attention.")
"""Parameters that only a student of videos has."""
_LAYER = re.compile(r"^((?:geometry_encoder|detr_encoder|detr_decoder)\.layers)\.(\d+)\.")
_TABLES = ("detr_decoder.query_embed.weight", "detr_decoder.reference_points.weight")


@dataclass
class EfficientSam3Output(ModelOutput):
    """The answers to p prompts about b images, by the names of transformers' ``Sam3Model``, and two features.

    pred_masks: logits. pred_boxes: normalised xyxy, not clamped. pred_logits: of each query. presence_logits: of the
    concept being in the image at all. semantic_seg: logits of all instances together. fpn_hidden_states: the three
    levels the heads read, finest first, per image. encoder_grid: the DETR encoder's last hidden state as a grid, per
    prompt.
    """

    pred_masks: Float[Tensor, "p q h w"] | None = None
    pred_boxes: Float[Tensor, "p q 4"] | None = None
    pred_logits: Float[Tensor, "p q"] | None = None
    presence_logits: Float[Tensor, "p 1"] | None = None
    semantic_seg: Float[Tensor, "p 1 h w"] | None = None
    fpn_hidden_states: tuple[Float[Tensor, "b c _ _"], ...] | None = None
    encoder_grid: Float[Tensor, "p c gh gw"] | None = None

    def answer(self) -> DetectorOutput:
        """The same in the currency of matching and losses; of an output that holds answers."""
        parts = (self.pred_masks, self.pred_boxes, self.pred_logits, self.presence_logits, self.semantic_seg)
        if any(part is None for part in parts) or self.fpn_hidden_states is None or self.encoder_grid is None:
            raise ValueError("no question is about these images")
        return DetectorOutput(*parts, self.fpn_hidden_states, self.encoder_grid)  # type: ignore[arg-type]


class EfficientSam3Model(Sam3LiteTextModel):
    """transformers' ``Sam3LiteTextModel`` that encodes each image once however many prompts ask about it.

    Padded words: attention does not see them, but the first and the last text layer are convolutions over the sequence,
    and the position table is stretched to its length. So an answer depends on the padding token and on the padded
    length: pad every prompt to one length with one token, in training and after.
    """

    config_class = EfficientSam3Config
    config: EfficientSam3Config
    vision_encoder: PyramidModel

    def __init__(self, config: EfficientSam3Config) -> None:
        super().__init__(config)
        self.memory_resampler = self.memory_attention = None
        if config.memory_latents:
            sizes = config.detr_encoder_config
            self.memory_resampler = PerceiverResampler(
                sizes, config.memory_latents, config.memory_layers, config.memory_windows
            )
            self.memory_attention = MemoryCrossAttention(sizes)
            self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Also of a checkpoint without memory, whose new modules transformers initialises here."""
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            init.normal_(module.latents, std=LATENT_STD)
            init.normal_(module.target)

    def forward(
        self,
        pixel_values: Float[Tensor, "b 3 h w"] | None = None,
        input_ids: Int[Tensor, "p t"] | None = None,
        attention_mask: Int[Tensor, "p t"] | None = None,
        input_boxes: Float[Tensor, "p k 4"] | None = None,
        input_boxes_labels: Int[Tensor, "p k"] | None = None,
        prompt_images: Int[Tensor, " p"] | None = None,
        vision_embeds: Sam3LiteTextVisionEncoderOutput | None = None,
        text_embeds: BaseModelOutputWithPooling | None = None,
    ) -> EfficientSam3Output:
        """Answer p prompts about b images; without any words, give the images' features alone.

        pixel_values: normalised with ``config.vision_config``'s image_mean and image_std; or vision_embeds, what
        ``get_vision_features`` returned for the images. input_ids, attention_mask: tokens, 1 where they are not
        padding; or text_embeds, what ``get_text_features`` returned (the mask is needed with it too). input_boxes:
        exemplars, normalised cxcywh; labels: 1 like this, 0 not like this, -10 padding. Words alone carry the geometry
        encoder's CLS token as in the original SAM 3; nothing has to be passed for it. prompt_images: the image each
        prompt asks about; None where there is one prompt per image. Raises ``ValueError`` unless images are given
        exactly once and words once at most.
        """
        return self.forward_video(
            pixel_values, input_ids, None, attention_mask=attention_mask, input_boxes=input_boxes,
            input_boxes_labels=input_boxes_labels, prompt_images=prompt_images, vision_embeds=vision_embeds,
            text_embeds=text_embeds,
        )  # fmt: skip

    def forward_video(
        self,
        pixel_values: Float[Tensor, "b 3 h w"] | None = None,
        input_ids: Int[Tensor, "p t"] | None = None,
        memory_features: Float[Tensor, "b f c mh mw"] | None = None,
        memory_ages: Float[Tensor, "b f"] | None = None,
        memory_valid: Bool[Tensor, "b f"] | None = None,
        memory_masks: Float[Tensor, "p f _ _"] | None = None,
        attention_mask: Int[Tensor, "p t"] | None = None,
        input_boxes: Float[Tensor, "p k 4"] | None = None,
        input_boxes_labels: Int[Tensor, "p k"] | None = None,
        prompt_images: Int[Tensor, " p"] | None = None,
        vision_embeds: Sam3LiteTextVisionEncoderOutput | None = None,
        text_embeds: BaseModelOutputWithPooling | None = None,
    ) -> EfficientSam3Output:
        """``forward``, with the memory of f past frames of each image between the DETR encoder and the decoders.

        memory_features: the coarsest pyramid level of the past frames, of this student or of its teacher, on any
        grid. memory_ages: how many annotated frames ago each was, None for consecutive ones, the
        oldest first. memory_valid: False for frames that only pad; an image needs one at least. memory_masks: where
        the one thing that each prompt asks about was in those frames, as shares of cells; None asks about whatever fits
        the words. Without memory_features the answer is that of ``forward`` bit for bit. Raises ``ValueError`` for
        memory that a student of images is given, or of another width, and as ``forward``.
        """
        if (pixel_values is None) == (vision_embeds is None):
            raise ValueError("give exactly one of pixel_values and vision_embeds")
        if input_ids is not None and text_embeds is not None:
            raise ValueError("give one of input_ids and text_embeds")
        vision = self.get_vision_features(pixel_values) if vision_embeds is None else vision_embeds
        if input_ids is not None:
            text_embeds = self.get_text_features(input_ids, attention_mask, return_dict=True)
        if text_embeds is None:
            return EfficientSam3Output(fpn_hidden_states=vision.fpn_hidden_states[:-1])
        boxes = None if input_boxes is None else input_boxes.to(self.dtype)
        recall = None
        if memory_features is not None:
            prompts = torch.arange(len(text_embeds.pooler_output), device=memory_features.device)
            image = prompts if prompt_images is None else prompt_images
            if memory_masks is None:
                memory = self.remember(memory_features, memory_ages, memory_valid)[image]
            else:  # a past of its own for every prompt
                ages, valid = (x if x is None else x[image] for x in (memory_ages, memory_valid))
                memory = self.remember(memory_features[image], ages, valid, memory_masks)
            recall = partial(self._recall, memory)
        found = ask(
            self, vision, prompt_images, text_embeds.pooler_output, attention_mask, boxes, input_boxes_labels,
            super().forward, recall,
        )  # fmt: skip
        return EfficientSam3Output(
            found.pred_masks, found.pred_boxes, found.pred_logits, found.presence_logits, found.semantic_seg, found.fpn,
            found.encoder,
        )  # fmt: skip

    def remember(
        self, features: Float[Tensor, "b f c mh mw"], ages: Float[Tensor, "b f"] | None = None,
        valid: Bool[Tensor, "b f"] | None = None, masks: Float[Tensor, "b f _ _"] | None = None,
    ) -> Float[Tensor, "b l c"]:  # fmt: skip
        """The past as ``config.memory_latents`` tokens; arguments as in ``forward_video``, for one prompt an image."""
        if self.memory_resampler is None:
            raise ValueError("a student of images has no memory; build it with memory_latents")
        b, frames, channels = features.shape[:3]
        if channels != self.config.detr_encoder_config.hidden_size:
            raise ValueError(
                f"memory of {channels} channels for a student of {self.config.detr_encoder_config.hidden_size}"
            )
        if valid is not None and not bool(valid.any(1).all()):
            raise ValueError("an image without a valid frame of memory: ask about it without memory")
        if ages is None:
            ages = torch.arange(frames, 0, -1, device=features.device).expand(b, -1)
        return self.memory_resampler(features.to(self.dtype), ages.to(self.dtype), valid, masks)

    def _recall(self, memory: Float[Tensor, "p l c"], encoded: ModelOutput) -> Tensor:
        assert self.memory_attention is not None
        return self.memory_attention(encoded.last_hidden_state, encoded.pos_embeds_flattened, memory)


def build_detector(
    config: EfficientSam3Config,
    pretrained: bool | Path = False,
) -> EfficientSam3Model:
    """A student with random weights in all but what ``pretrained`` gives its backbone, as for ``build_trunk``.

    A file may hold more than the backbone: of a ``StudentTrunk``'s, the head's weights are left out. Raises
    ``UserError`` where ``build_trunk`` would.
    """
    model = EfficientSam3Model(config)
    vision = config.vision_config
    start_backbone(model.vision_encoder.backbone, vision.backbone, vision.image_size, pretrained)
    return model


def inherit(student: EfficientSam3Model, teacher_state: Mapping[str, Tensor]) -> list[str]:
    """Copy every tensor of a ``Sam3Model`` that fits the student's ``INHERITED`` by name and shape; the names taken.

    Of a deeper teacher the layers are taken evenly, the first and the last among them (0, 2 and 5 of six; a single
    layer is the first, which reads what it was trained to read). Of a table with more queries, rows are taken evenly,
    the same of both tables: queries have no order, and a query and its reference point belong together. As
    DistilBERT's initialisation (Sanh et al., 2019). Feed-forward layers of another width do not fit and stay random.
    """
    depths = _depths(teacher_state), _depths(student.state_dict())
    taken = []
    for name, own in student.state_dict().items():
        if not name.startswith(INHERITED) or (source := _teacher_name(name, *depths)) not in teacher_state:
            continue
        value = teacher_state[source]
        if name in _TABLES and len(value) > len(own):
            value = value[[_spread(row, len(value), len(own)) for row in range(len(own))]]
        if value.shape == own.shape:
            own.copy_(value)
            taken.append(name)
    return taken


def _spread(index: int, many: int, few: int) -> int:
    """Where the ``index``-th of ``few`` falls among ``many``: the ends on the ends, the rest evenly between."""
    return index * (many - 1) // max(few - 1, 1)


def _depths(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Layers in each stack of the heads."""
    found: dict[str, int] = {}
    for match in filter(None, map(_LAYER.match, state)):
        found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _teacher_name(name: str, teacher: Mapping[str, int], student: Mapping[str, int]) -> str:
    match = _LAYER.match(name)
    if match is None or match[1] not in teacher:
        return name
    stack, layer = match[1], int(match[2])
    return f"{stack}.{_spread(layer, teacher[stack], student[stack])}.{name[match.end() :]}"


AutoModel.register(EfficientSam3Config, EfficientSam3Model)
