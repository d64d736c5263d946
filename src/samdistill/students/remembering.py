"""SAM 3 detectors that encode an image once for any number of prompts and can have a memory of past frames."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextVisionEncoderOutput
from transformers.utils import ModelOutput

from ..ops.outputs import ask
from ..types import DetectorOutput
from .memory import LATENT_STD, MemoryCrossAttention, PerceiverResampler

MEMORY = ("memory_resampler.", "memory_attention.")
"""Prefixes of the parameters that only a video student has."""


@dataclass
class EfficientSam3Output(ModelOutput):
    """Predictions for p prompts on b images, named as in transformers' ``Sam3Model``, and two features.

    Attributes:
        pred_masks: Mask logits of q queries.
        pred_boxes: Boxes, normalised xyxy, not clamped.
        pred_logits: Logit of each query.
        presence_logits: Logit of the concept being in the image.
        semantic_seg: Mask logits of all instances together.
        fpn_hidden_states: The three levels that the heads read, finest first, per image.
        encoder_grid: Last hidden state of the DETR encoder as a grid, per prompt.
    """

    pred_masks: Float[Tensor, "p q h w"] | None = None
    pred_boxes: Float[Tensor, "p q 4"] | None = None
    pred_logits: Float[Tensor, "p q"] | None = None
    presence_logits: Float[Tensor, "p 1"] | None = None
    semantic_seg: Float[Tensor, "p 1 h w"] | None = None
    fpn_hidden_states: tuple[Float[Tensor, "b c _ _"], ...] | None = None
    encoder_grid: Float[Tensor, "p c gh gw"] | None = None
    trunk: Float[Tensor, "b d gh gw"] | None = None

    @classmethod
    def of(cls, found: DetectorOutput) -> EfficientSam3Output:
        """Convert a ``DetectorOutput`` to the output of a model."""
        return cls(
            found.pred_masks, found.pred_boxes, found.pred_logits, found.presence_logits, found.semantic_seg, found.fpn,
            found.encoder, found.trunk,
        )  # fmt: skip

    def answer(self) -> DetectorOutput:
        """Convert the output to a ``DetectorOutput`` for matching and losses.

        Raises:
            ValueError: The output has no predictions, because there were no prompts.
        """
        parts = (self.pred_masks, self.pred_boxes, self.pred_logits, self.presence_logits, self.semantic_seg)
        if any(part is None for part in parts) or self.fpn_hidden_states is None:
            raise ValueError("the output has no predictions, because no prompts were given")
        return DetectorOutput(*parts, self.fpn_hidden_states, self.encoder_grid, self.trunk)  # type: ignore[arg-type]


class Remembering:
    """What the video job asks of a detector, for subclasses of transformers' SAM 3 models.

    A subclass inherits from this class and then from ``Sam3Model`` or ``Sam3LiteTextModel``. Its configuration has the
    fields of ``MemoryFields``.

    Attributes:
        coarsest: Name of the last layer of the coarsest feature level. Only the memory reads this level.
    """

    coarsest: ClassVar[str]
    config: Any
    dtype: torch.dtype
    memory_resampler: PerceiverResampler | None
    memory_attention: MemoryCrossAttention | None

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.memory_resampler = self.memory_attention = None
        if config.memory_latents:
            sizes = config.detr_encoder_config
            self.memory_resampler = PerceiverResampler(
                sizes, config.memory_latents, config.memory_layers, config.memory_windows
            )
            self.memory_attention = MemoryCrossAttention(sizes)
            self.post_init()  # type: ignore[attr-defined]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the memory. transformers also calls this for a checkpoint that has no memory."""
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
        """Detect the instances of p prompts on b images. Without text the result has only the images' features.

        Text without boxes includes the geometry encoder's CLS token, as in the original SAM 3. No input is needed for
        it.

        Args:
            pixel_values: Images, normalised with image_mean and image_std of ``config.vision_config``.
            input_ids: Token ids.
            attention_mask: 1 for tokens, 0 for padding. It is also needed with ``text_embeds``.
            input_boxes: Exemplar boxes, normalised cxcywh.
            input_boxes_labels: 1 for positive exemplars, 0 for negative ones, -10 for padding.
            prompt_images: Index of the image of each prompt. None means one prompt per image.
            vision_embeds: Result of ``get_vision_features``, instead of ``pixel_values``.
            text_embeds: Result of ``get_text_features``, instead of ``input_ids``.

        Raises:
            ValueError: Images are not given exactly once, or text is given twice.
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
        """``forward`` with a memory of f past frames per image, used between the DETR encoder and the decoders.

        Without ``memory_features`` the result is bitwise equal to that of ``forward``. The other arguments are those of
        ``forward``.

        Args:
            memory_features: The coarsest pyramid level of the past frames, of this student or of its teacher, on any
                grid.
            memory_ages: Age of each past frame in annotated frames. None means consecutive frames, oldest first.
            memory_valid: False for frames that are padding. Every image needs a valid frame.
            memory_masks: Masks of the object that each prompt refers to in the past frames, as the covered share of
                each cell. None means that a prompt refers to everything that matches its text.

        Raises:
            ValueError: The student has no memory, the features have another number of channels, or as in ``forward``.
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
            prompts = torch.arange(text_embeds.pooler_output.shape[0], device=memory_features.device)
            image = prompts if prompt_images is None else prompt_images
            if memory_masks is None:
                memory = self.remember(memory_features, memory_ages, memory_valid)[image]
            else:  # the masks differ per prompt, so each prompt needs its own memory
                ages, valid = (x if x is None else x[image] for x in (memory_ages, memory_valid))
                memory = self.remember(memory_features[image], ages, valid, memory_masks)
            recall = partial(self._recall, memory)
        found = ask(
            self, vision, prompt_images, text_embeds.pooler_output, attention_mask, boxes, input_boxes_labels,
            super().forward, recall,
        )  # fmt: skip
        return EfficientSam3Output.of(found)

    def remember(
        self, features: Float[Tensor, "b f c mh mw"], ages: Float[Tensor, "b f"] | None = None,
        valid: Bool[Tensor, "b f"] | None = None, masks: Float[Tensor, "b f _ _"] | None = None,
    ) -> Float[Tensor, "b l c"]:  # fmt: skip
        """Encode past frames to ``config.memory_latents`` memory tokens.

        Args:
            features: Feature maps of f past frames, see ``forward_video``.
            ages: Age of each frame. None means consecutive frames, oldest first.
            valid: False for frames that are padding.
            masks: Masks of the object, as the covered share of each cell.

        Raises:
            ValueError: The student has no memory, the features have another number of channels, or an item has no valid
                frame.
        """
        if self.memory_resampler is None:
            raise ValueError("this student has no memory; build it with memory_latents")
        b, frames, channels = features.shape[:3]
        if channels != self.config.detr_encoder_config.hidden_size:
            raise ValueError(
                f"memory has {channels} channels, but the student has {self.config.detr_encoder_config.hidden_size}"
            )
        if valid is not None and not bool(valid.any(1).all()):
            raise ValueError("an image has no valid memory frame; run it without memory")
        if ages is None:
            ages = torch.arange(frames, 0, -1, device=features.device).expand(b, -1)
        return self.memory_resampler(features.to(self.dtype), ages.to(self.dtype), valid, masks)

    def _recall(self, memory: Float[Tensor, "p l c"], encoded: ModelOutput) -> Tensor:
        assert self.memory_attention is not None
        return self.memory_attention(encoded.last_hidden_state, encoded.pos_embeds_flattened, memory)
