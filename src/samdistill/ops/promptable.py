"""Asking a promptable SAM: images once, prompts many times, masks out.

Works on any ``Sam3TrackerModel``, whatever trunk it hosts, and on any ``SamModel``, MobileSAM among them. Gradients
flow unless the caller turns them off, so the same functions serve teachers, students, training and inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Sam3Model, Sam3TrackerModel, SamModel

from ..reading import running
from ..types import GroupSignals, ImageBatch, PromptGroup, Prompts, UserError
from .images import IMAGENET_MEAN, IMAGENET_STD, SAM3_MEAN, SAM3_STD, Statistics, normalise

Promptable = Sam3TrackerModel | SamModel
"""What can be asked with the functions of this file. ``students.MobileSamModel`` is a ``SamModel``."""


@dataclass(frozen=True)
class Embeddings:
    """What the mask decoder reads. levels end with the image embedding; before it a SAM 3 tracker has two maps of 4 and
    2 times its resolution, a SAM none.

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

    def rows(self, index: Int[Tensor, " g"]) -> Embeddings:
        """The images ``index`` as a batch, in that order; gradients go back to where they came from."""
        index = index.to(self.trunk.device)
        return Embeddings(tuple(level[index] for level in self.levels), self.trunk[index])


@dataclass(frozen=True)
class MaskPrediction:
    """What a model answers to prompts, and what its decoder computed on the way.

    low_res_masks: logits at a quarter of the patch size. iou_scores: predicted, in 0..1 in SAM 3, unbounded in SAM. m
    is 1, or 3 with multimask. mask_tokens: the decoder's four after its two-way transformer, whatever m is.
    prompt_embed: the image embedding as it enters the first two-way block, dense prompt embedding added; k is n where
    the prompts hold masks, else 1, since it is then the same for all.
    """

    low_res_masks: Float[Tensor, "b n m h w"]
    iou_scores: Float[Tensor, "b n m"]
    mask_tokens: Float[Tensor, "b n t c"]
    prompt_embed: Float[Tensor, "b k c gh gw"]

    def best(self) -> tuple[Float[Tensor, "b n h w"], Float[Tensor, "b n"]]:
        """The mask with the highest predicted IoU of each prompt, and that IoU."""
        scores, index = self.iou_scores.max(-1)
        picked = self.low_res_masks.gather(
            2, index[..., None, None, None].expand(-1, -1, 1, *self.low_res_masks.shape[-2:])
        )
        return picked[:, :, 0], scores


def image_size(model: Promptable | Sam3Model) -> int:
    """Side in pixels of the square canvas that the model reads and that prompts are counted on."""
    if isinstance(model, Sam3Model):
        return int(model.config.vision_config.backbone_config.image_size)
    return int(model.config.prompt_encoder_config.image_size)


def embedding_grid(model: Promptable) -> tuple[int, int]:
    """Height and width of the image embedding, in cells."""
    side = image_size(model) // int(model.config.prompt_encoder_config.patch_size)
    return side, side


def decoder_width(model: Promptable) -> int:
    """Channels of the image embedding and of every token of the mask decoder."""
    return int(model.config.mask_decoder_config.hidden_size)


def trunk_channels(model: Promptable) -> int:
    """Channels of ``Embeddings.trunk``."""
    if isinstance(model, Sam3TrackerModel):
        return int(model.config.vision_config.backbone_config.hidden_size)
    return model.vision_encoder.neck.conv1.in_channels


def statistics(model: Promptable) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation, in the 0..1 range, that the model wants its images normalised with."""
    if isinstance(model, Sam3TrackerModel):
        return SAM3_MEAN, SAM3_STD
    config = model.config  # only MobileSAM's says; transformers keeps SAM's with the processor
    return tuple(getattr(config, "image_mean", IMAGENET_MEAN)), tuple(getattr(config, "image_std", IMAGENET_STD))


def embed(model: Promptable, batch: ImageBatch) -> Embeddings:
    """Run the vision encoder and shape its levels as the decoder wants them.

    A SAM sees padding that is zero after normalisation, as it was trained (Kirillov et al., 2023); a SAM 3 tracker sees
    it as it comes. Raises ``UserError`` where a SAM gets a canvas of another size than its own.
    """
    with running(model):
        return _embed_tracker(model, batch) if isinstance(model, Sam3TrackerModel) else _embed_sam(model, batch)


def _embed_sam(model: SamModel, batch: ImageBatch) -> Embeddings:
    canvas = (batch.images.shape[-2], batch.images.shape[-1])
    if canvas != (image_size(model),) * 2:
        raise UserError(
            f"images of {canvas[0]} x {canvas[1]} px for a {type(model).__name__} of {image_size(model)} px"
        )
    pixels = normalise(batch.images, *statistics(model)) * batch.valid(canvas)[:, None]
    with _inputs(model.vision_encoder.neck) as seen:
        embedding = model.vision_encoder(pixels.to(model.dtype)).last_hidden_state
    return Embeddings((embedding,), seen[0].permute(0, 3, 1, 2))


def _embed_tracker(model: Sam3TrackerModel, batch: ImageBatch) -> Embeddings:
    features = model.get_image_features(normalise(batch.images).to(model.dtype), return_dict=True)
    sizes = model.backbone_feature_sizes
    # a neck of four levels has one that no head reads; transformers adds the embedding to that one
    maps = list(features.fpn_hidden_states[: len(sizes)])
    maps[-1] = maps[-1] + model.no_memory_embedding
    return Embeddings(
        tuple(m.permute(1, 2, 0).reshape(len(batch), -1, *s) for m, s in zip(maps, sizes, strict=True)),
        as_grid(features.last_hidden_state, model, batch),
    )


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """First positional arguments of every call of ``module`` meanwhile."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


def as_grid(tokens: Float[Tensor, "b n d"], model: PreTrainedModel, batch: ImageBatch) -> Float[Tensor, "b d gh gw"]:
    """A SAM 3 trunk's tokens laid over the canvas, one per patch."""
    patch = model.config.vision_config.backbone_config.patch_size
    height, width = batch.images.shape[-2] // patch, batch.images.shape[-1] // patch
    return tokens.transpose(1, 2).reshape(len(batch), -1, height, width)


def embed_trunk(model: PreTrainedModel, batch: ImageBatch) -> Float[Tensor, "b d gh gw"]:
    """The trunk's raw output alone, of any ``Promptable`` and of a ``Sam3Model``."""
    if isinstance(model, SamModel):
        return embed(model, batch).trunk  # its neck costs next to nothing
    with running(model):
        tokens = model.vision_encoder.backbone(normalise(batch.images).to(model.dtype)).last_hidden_state
        return as_grid(tokens, model, batch)


def predict(model: Promptable, embeddings: Embeddings, prompts: Prompts, multimask: bool = False) -> MaskPrediction:
    """Masks for n prompts in each of b images.

    A mask prompt belongs to one object, but the decoder adds it to the whole image's embedding; prompts with masks
    are therefore run as n images of one object each.
    """
    b, n = prompts.valid.shape
    levels, points, labels, boxes, masks = embeddings.levels, prompts.points, prompts.labels, prompts.boxes, None
    if prompts.masks is not None:
        levels = tuple(level.repeat_interleave(n, 0) for level in levels)
        masks = prompts.masks.flatten(0, 1)[:, None].to(model.dtype)
        points, labels, boxes = (t if t is None else t.flatten(0, 1)[:, None] for t in (points, labels, boxes))
    with running(model), _decoder(model) as seen:
        out = model(
            image_embeddings=list(levels) if isinstance(model, Sam3TrackerModel) else levels[-1],
            input_points=points, input_labels=labels, input_boxes=boxes, input_masks=masks,
            multimask_output=multimask,
        )  # fmt: skip
    low_res, scores, tokens = (
        t.reshape(b, n, *t.shape[2:]) for t in (out.pred_masks, out.iou_scores, _mask_tokens(model, seen["queries"]))
    )
    entered = seen["image"].unflatten(0, (b, n))
    return MaskPrediction(low_res, scores, tokens, entered if masks is not None else entered[:, :1])


def answer_group(model: Promptable, embeddings: Embeddings, group: PromptGroup) -> GroupSignals:
    """What the model says to one group about its images, of the whole batch that ``embeddings`` holds."""
    said = predict(model, embeddings.rows(group.rows), group.prompts, group.multimask)
    return GroupSignals(said.prompt_embed, said.mask_tokens, said.low_res_masks, said.iou_scores)


def _mask_tokens(model: Promptable, queries: Float[Tensor, "b n q c"]) -> Float[Tensor, "b n t c"]:
    """The mask tokens among the decoder's: after the token of the IoU and, in SAM 3, that of the object's score."""
    before = 2 if isinstance(model, Sam3TrackerModel) else 1
    return queries[:, :, before : before + model.mask_decoder.num_mask_tokens]


@contextmanager
def _decoder(model: Promptable) -> Iterator[dict[str, Tensor]]:
    """``image``: what enters the two-way transformer of the next call, (b * n, c, gh, gw); ``queries``: what leaves."""
    seen: dict[str, Tensor] = {}
    transformer = model.mask_decoder.transformer

    def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["image"] = kwargs["image_embeddings"]

    def leaving(_: nn.Module, args: tuple[Any, ...], result: tuple[Tensor, ...]) -> None:
        seen["queries"] = result[0]

    hooks = [
        transformer.register_forward_pre_hook(entering, with_kwargs=True), transformer.register_forward_hook(leaving),
    ]  # fmt: skip
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def to_canvas(low_res_masks: Float[Tensor, "b n h w"], size: tuple[int, int]) -> Bool[Tensor, "b n H W"]:
    """Upsample logits to the canvas and threshold at 0, as SAM's post-processing does."""
    return F.interpolate(low_res_masks, size, mode="bilinear", align_corners=False) > 0
