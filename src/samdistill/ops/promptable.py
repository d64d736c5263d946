"""Asking a promptable SAM: images once, prompts many times, masks out.

Works on any ``Sam3TrackerModel``, whatever trunk it hosts. Gradients flow unless the caller turns them off, so the
same functions serve teachers, students, training and inference.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Sam3TrackerModel

from ..types import ImageBatch, Prompts
from .images import normalise


@dataclass(frozen=True)
class Embeddings:
    """What the mask decoder reads: two high-resolution maps (strides 3.5 and 7) and the stride-14 image embedding.

    trunk: the raw output of the trunk, before the neck; what encoder distillation matches.
    """

    levels: tuple[Tensor, ...]
    trunk: Float[Tensor, "b d gh gw"]

    @property
    def image_embedding(self) -> Float[Tensor, "b c gh gw"]:
        return self.levels[-1]

    def one_image(self, index: int) -> Embeddings:
        """Image ``index`` as a batch of one."""
        at = slice(index, index + 1)
        return Embeddings(tuple(level[at] for level in self.levels), self.trunk[at])


@dataclass(frozen=True)
class MaskPrediction:
    """low_res_masks: logits at a quarter of the patch size; iou_scores in 0..1; m is 1, or 3 with multimask."""

    low_res_masks: Float[Tensor, "b n m h w"]
    iou_scores: Float[Tensor, "b n m"]

    def best(self) -> tuple[Float[Tensor, "b n h w"], Float[Tensor, "b n"]]:
        """The mask with the highest predicted IoU of each prompt, and that IoU."""
        scores, index = self.iou_scores.max(-1)
        picked = self.low_res_masks.gather(
            2, index[..., None, None, None].expand(-1, -1, 1, *self.low_res_masks.shape[-2:])
        )
        return picked[:, :, 0], scores


def embed(model: Sam3TrackerModel, batch: ImageBatch) -> Embeddings:
    """Run the vision encoder and shape its levels as the decoder wants them."""
    features = model.get_image_features(normalise(batch.images), return_dict=True)
    maps = list(features.fpn_hidden_states)
    maps[-1] = maps[-1] + model.no_memory_embedding
    sizes = model.backbone_feature_sizes
    return Embeddings(
        tuple(m.permute(1, 2, 0).reshape(len(batch), -1, *s) for m, s in zip(maps, sizes, strict=False)),
        as_grid(features.last_hidden_state, model, batch),
    )


def as_grid(tokens: Float[Tensor, "b n d"], model: PreTrainedModel, batch: ImageBatch) -> Float[Tensor, "b d gh gw"]:
    """Trunk tokens laid over the canvas, one per patch."""
    patch = model.config.vision_config.backbone_config.patch_size
    height, width = batch.images.shape[-2] // patch, batch.images.shape[-1] // patch
    return tokens.transpose(1, 2).reshape(len(batch), -1, height, width)


def embed_trunk(model: PreTrainedModel, batch: ImageBatch) -> Float[Tensor, "b d gh gw"]:
    """The trunk's raw output alone, of any SAM 3 model (``Sam3TrackerModel`` or ``Sam3Model``)."""
    tokens = model.vision_encoder.backbone(normalise(batch.images)).last_hidden_state
    return as_grid(tokens, model, batch)


def predict(
    model: Sam3TrackerModel, embeddings: Embeddings, prompts: Prompts, multimask: bool = False
) -> MaskPrediction:
    """Masks for n prompts in each of b images.

    A mask prompt belongs to one object, but the decoder adds it to the whole image's embedding; prompts with masks
    are therefore run as n images of one object each.
    """
    b, n = prompts.valid.shape
    levels, points, labels, boxes, masks = embeddings.levels, prompts.points, prompts.labels, prompts.boxes, None
    if prompts.masks is not None:
        levels = tuple(level.repeat_interleave(n, 0) for level in levels)
        masks = prompts.masks.flatten(0, 1)[:, None]
        points, labels, boxes = (t if t is None else t.flatten(0, 1)[:, None] for t in (points, labels, boxes))
    out = model(
        image_embeddings=list(levels), input_points=points, input_labels=labels, input_boxes=boxes, input_masks=masks,
        multimask_output=multimask,
    )  # fmt: skip
    low_res, scores = out.pred_masks, out.iou_scores
    return MaskPrediction(low_res.reshape(b, n, *low_res.shape[2:]), scores.reshape(b, n, *scores.shape[2:]))


def to_canvas(low_res_masks: Float[Tensor, "b n h w"], size: tuple[int, int]) -> Bool[Tensor, "b n H W"]:
    """Upsample logits to the canvas and threshold at 0, as SAM's post-processing does."""
    return F.interpolate(low_res_masks, size, mode="bilinear", align_corners=False) > 0
