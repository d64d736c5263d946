"""Run a promptable SAM: encode images once, then predict masks for any number of prompts.

The functions accept any ``Sam3TrackerModel`` or ``Sam2Model``, with any trunk, and any ``SamModel``, MobileSAM
included. They record gradients unless the caller disables them, so teachers, students, training and inference share
them. A subclass that computes its answers in another way registers its own ``encode`` and ``decode``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Sam2Model, Sam3Model, Sam3TrackerModel, SamModel

from ..reading import running
from ..types import GroupSignals, ImageBatch, PromptGroup, Prompts, UserError
from .images import IMAGENET_MEAN, IMAGENET_STD, SAM3_MEAN, SAM3_STD, Statistics, normalise

Promptable = Sam3TrackerModel | Sam2Model | SamModel
"""Models that the functions of this file accept. ``MobileSamModel`` and ``HostedSamModel`` are ``SamModel``."""

Pyramidal = Sam3TrackerModel | Sam2Model
"""Models whose mask decoder reads three levels and gives an object score."""


@dataclass(frozen=True)
class Embeddings:
    """Image features that the mask decoder reads.

    Attributes:
        levels: Feature maps, finest first. The last one is the image embedding. A SAM 2 and a SAM 3 tracker have two
            more, with 4 and 2 times its resolution. A SAM has none.
        trunk: What encoder distillation compares: output of the trunk before the neck; of a SAM 2, or a SAM whose
            distilled trunk needs no neck, the image embedding (of a SAM 2 before the no-memory embedding is added).
            None for an exported model, whose files do not give it.
    """

    levels: tuple[Tensor, ...]
    trunk: Float[Tensor, "b d gh gw"] | None

    @property
    def image_embedding(self) -> Float[Tensor, "b c gh gw"]:
        """The image embedding, of shape (b, c, gh, gw)."""
        return self.levels[-1]

    def one_image(self, index: int) -> Embeddings:
        """Return image ``index`` as a batch of one."""
        return self._at(slice(index, index + 1))

    def rows(self, index: Int[Tensor, " g"]) -> Embeddings:
        """Gather images into a batch. Gradients flow back to the original tensors.

        Args:
            index: Images in the wanted order, of shape (g,).
        """
        return self._at(index.to(self.image_embedding.device))

    def _at(self, index: slice | Tensor) -> Embeddings:
        return Embeddings(
            tuple(level[index] for level in self.levels), None if self.trunk is None else self.trunk[index]
        )


@dataclass(frozen=True)
class MaskPrediction:
    """Predictions for n prompts in each of b images, and tensors from inside the decoder.

    Attributes:
        low_res_masks: Mask logits of shape (b, n, m, h, w). h and w are 4 times those of the image embedding. m is 1,
            or 3 with multimask.
        iou_scores: Predicted IoU of shape (b, n, m): in 0..1 for SAM 3, unbounded for SAM.
        mask_tokens: The decoder's four mask tokens after the two-way transformer, for any m. None for an exported
            model.
        prompt_embed: Image embedding plus dense prompt embedding, as it enters the first two-way block. k is n if the
            prompts have masks. Otherwise k is 1, because it is the same for all prompts of an image. None for an
            exported model.
    """

    low_res_masks: Float[Tensor, "b n m h w"]
    iou_scores: Float[Tensor, "b n m"]
    mask_tokens: Float[Tensor, "b n t c"] | None
    prompt_embed: Float[Tensor, "b k c gh gw"] | None

    def best(self) -> tuple[Float[Tensor, "b n h w"], Float[Tensor, "b n"]]:
        """Select the mask with the highest predicted IoU for each prompt.

        Returns:
            Mask logits of shape (b, n, h, w), and their predicted IoU of shape (b, n).
        """
        scores, index = self.iou_scores.max(-1)
        picked = self.low_res_masks.gather(
            2, index[..., None, None, None].expand(-1, -1, 1, *self.low_res_masks.shape[-2:])
        )
        return picked[:, :, 0], scores


def image_size(model: Promptable | Sam3Model) -> int:
    """Return the side in pixels of the model's square input canvas. Prompts are in pixels of this canvas."""
    if isinstance(model, Sam3Model):
        return int(model.config.vision_config.backbone_config.image_size)
    return int(model.config.prompt_encoder_config.image_size)


def embedding_grid(model: Promptable) -> tuple[int, int]:
    """Return height and width of the image embedding in cells."""
    side = image_size(model) // int(model.config.prompt_encoder_config.patch_size)
    return side, side


def decoder_width(model: Promptable) -> int:
    """Return the number of channels of the image embedding and of the mask decoder's tokens."""
    return int(model.config.mask_decoder_config.hidden_size)


def trunk_channels(model: Promptable) -> int:
    """Return the number of channels of ``Embeddings.trunk``."""
    if isinstance(model, Sam3TrackerModel):
        return int(model.config.vision_config.backbone_config.hidden_size)
    if isinstance(model, Sam2Model):
        return decoder_width(model)
    neck = getattr(model.vision_encoder, "neck", None)
    return decoder_width(model) if neck is None else neck.conv1.in_channels


def statistics(model: Promptable) -> tuple[Statistics, Statistics]:
    """Return the mean and standard deviation with which the model's images are normalised, in the range 0..1."""
    if isinstance(model, Sam3TrackerModel):
        return SAM3_MEAN, SAM3_STD
    config = model.config  # only MobileSAM's has them; transformers stores SAM's in the processor
    return tuple(getattr(config, "image_mean", IMAGENET_MEAN)), tuple(getattr(config, "image_std", IMAGENET_STD))


def embed(model: Promptable, batch: ImageBatch) -> Embeddings:
    """Encode images.

    For a SAM, padding is set to zero after normalisation, as in its training. For a SAM 2 and a SAM 3 tracker, padding
    is normalised as it is in the batch.

    Args:
        model: The model.
        batch: b images on the model's canvas.

    Returns:
        The features, in the shapes that the mask decoder reads.

    Raises:
        UserError: The canvas does not have the size that a SAM or SAM 2 needs, or the model cannot run.

    Source:
        Kirillov et al., Segment Anything, 2023.
    """
    with running(model):
        if isinstance(model, Sam2Model):
            check_canvas(model, batch)
        padded = isinstance(model, SamModel)
        return encode(model, sam_pixels(model, batch) if padded else normalise(batch.images, *statistics(model)))


@singledispatch
def encode(model: Promptable, pixels: Float[Tensor, "b 3 s s"]) -> Embeddings:
    """Encode normalised images. Registered for each class of promptable models."""
    raise TypeError(f"{type(model).__name__} is not a promptable model")


def sam_pixels(model: SamModel, batch: ImageBatch) -> Float[Tensor, "b 3 s s"]:
    """Normalise images for a SAM, with padding set to zero.

    Raises:
        UserError: The canvas does not have the size that the model needs.
    """
    check_canvas(model, batch)
    return normalise(batch.images, *statistics(model)) * batch.valid((image_size(model),) * 2)[:, None]


def check_canvas(model: Promptable, batch: ImageBatch) -> None:
    """Raise ``UserError`` if the canvas does not have the size that ``model`` needs."""
    canvas = (batch.images.shape[-2], batch.images.shape[-1])
    if canvas != (image_size(model),) * 2:
        raise UserError(
            f"a {type(model).__name__} needs images of {image_size(model)} x {image_size(model)} px, "
            f"got {canvas[0]} x {canvas[1]} px"
        )


@encode.register(SamModel)
def _encode_sam(model: SamModel, pixels: Float[Tensor, "b 3 s s"]) -> Embeddings:
    with _inputs(getattr(model.vision_encoder, "neck", None)) as seen:
        embedding = model.vision_encoder(pixels.to(model.dtype)).last_hidden_state
    return Embeddings((embedding,), seen[0].permute(0, 3, 1, 2) if seen else embedding)


@encode.register(Sam3TrackerModel)
def _encode_tracker(model: Sam3TrackerModel, pixels: Float[Tensor, "b 3 s s"]) -> Embeddings:
    features = model.get_image_features(pixels.to(model.dtype), return_dict=True)
    return Embeddings(levels_of(model, features), as_grid(features.last_hidden_state, model, pixels))


@encode.register(Sam2Model)
def _encode_sam2(model: Sam2Model, pixels: Float[Tensor, "b 3 s s"]) -> Embeddings:
    levels = levels_of(model, model.get_image_features(pixels.to(model.dtype), return_dict=True))
    return Embeddings(levels, levels[-1] - model.no_memory_embedding.view(1, -1, 1, 1))


def levels_of(model: Pyramidal, features: Any) -> tuple[Float[Tensor, "b _ _ _"], ...]:
    """Return the levels that the mask decoder reads, finest first, from the result of ``get_image_features``."""
    sizes = model.backbone_feature_sizes
    # the fourth level of a SAM 3's neck is read by no head, but transformers adds the embedding to that level
    maps = list(features.fpn_hidden_states[: len(sizes)])
    maps[-1] = maps[-1] + model.no_memory_embedding
    return tuple(m.permute(1, 2, 0).reshape(m.shape[1], m.shape[2], *s) for m, s in zip(maps, sizes, strict=True))


@contextmanager
def _inputs(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect the first positional argument of every call of ``module`` inside a ``with`` block; none if it is None."""
    seen: list[Tensor] = []
    if module is None:
        yield seen
        return
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


def as_grid(
    tokens: Float[Tensor, "b n d"], model: PreTrainedModel, pixels: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, "b d gh gw"]:
    """Reshape the patch tokens of a SAM 3 trunk, (b, n, d), to a feature map (b, d, gh, gw)."""
    patch = model.config.vision_config.backbone_config.patch_size
    height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    return tokens.transpose(1, 2).reshape(len(pixels), -1, height, width)


def embed_trunk(model: PreTrainedModel, batch: ImageBatch) -> Float[Tensor, "b d gh gw"]:
    """Encode images with the trunk only.

    Args:
        model: A ``Promptable`` or a ``Sam3Model``.
        batch: b images on the model's canvas.

    Returns:
        Output of the trunk before the neck, of shape (b, d, gh, gw).

    Raises:
        UserError: As for ``embed``.
    """
    if isinstance(model, SamModel | Sam2Model):
        return embed(model, batch).trunk  # includes the neck, whose cost is small
    with running(model):
        pixels = normalise(batch.images)
        return as_grid(model.vision_encoder.backbone(pixels.to(model.dtype)).last_hidden_state, model, pixels)


def predict(model: Promptable, embeddings: Embeddings, prompts: Prompts, multimask: bool = False) -> MaskPrediction:
    """Predict masks for n prompts in each of b images.

    The decoder adds a mask prompt to the embedding of the whole image, although the prompt belongs to one object.
    Prompts with masks are therefore run as b * n images with one object each.

    Args:
        model: The model.
        embeddings: Features of b images.
        prompts: n prompts for each image, in pixels of the canvas.
        multimask: Predict three masks for each prompt instead of one.

    Returns:
        The predictions, at the decoder's resolution.

    Raises:
        UserError: The model cannot run.

    Example:
        >>> masks, iou = predict(model, embed(model, batch), prompts).best()
    """
    with running(model):
        return decode(model, embeddings, prompts, multimask)


@singledispatch
def decode(model: Promptable, embeddings: Embeddings, prompts: Prompts, multimask: bool) -> MaskPrediction:
    """Predict masks. Registered for each class of promptable models; see ``predict``."""
    b, n = prompts.valid.shape
    levels, points, labels, boxes, masks = embeddings.levels, prompts.points, prompts.labels, prompts.boxes, None
    if prompts.masks is not None:
        levels = tuple(level.repeat_interleave(n, 0) for level in levels)
        masks = prompts.masks.flatten(0, 1)[:, None].to(model.dtype)
        points, labels, boxes = (t if t is None else t.flatten(0, 1)[:, None] for t in (points, labels, boxes))
    with _decoder(model) as seen:
        out = model(
            image_embeddings=list(levels) if isinstance(model, Pyramidal) else levels[-1],
            input_points=points, input_labels=labels, input_boxes=boxes, input_masks=masks,
            multimask_output=multimask,
        )  # fmt: skip
    low_res, scores, tokens = (
        t.reshape(b, n, *t.shape[2:]) for t in (out.pred_masks, out.iou_scores, _mask_tokens(model, seen["queries"]))
    )
    entered = seen["image"].unflatten(0, (b, n))
    return MaskPrediction(low_res, scores, tokens, entered if masks is not None else entered[:, :1])


def answer_group(model: Promptable, embeddings: Embeddings, group: PromptGroup) -> GroupSignals:
    """Predict masks for one group of prompts.

    Args:
        model: The model.
        embeddings: Features of all images of the batch.
        group: Prompts for some of the images.

    Returns:
        Predictions and decoder tensors, in the order of the group.
    """
    said = predict(model, embeddings.rows(group.rows), group.prompts, group.multimask)
    return GroupSignals(said.prompt_embed, said.mask_tokens, said.low_res_masks, said.iou_scores)


def _mask_tokens(model: Promptable, queries: Float[Tensor, "b n q c"]) -> Float[Tensor, "b n t c"]:
    """Select the mask tokens of the decoder. They follow the IoU token and, in SAM 2 and 3, the object score token."""
    before = 2 if isinstance(model, Pyramidal) else 1
    return queries[:, :, before : before + model.mask_decoder.num_mask_tokens]


@contextmanager
def _decoder(model: Promptable) -> Iterator[dict[str, Tensor]]:
    """Record tensors of the mask decoder's next call inside a ``with`` block.

    Yields:
        A dict. After the call, ``image`` is the input of the two-way transformer, of shape (b * n, c, gh, gw), and
        ``queries`` are its output tokens.
    """
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
    """Upsample mask logits to the canvas (bilinear) and threshold them at 0, as SAM's post-processing does.

    Args:
        low_res_masks: Mask logits of shape (b, n, h, w).
        size: Height H and width W of the canvas in pixels.

    Returns:
        Masks of shape (b, n, H, W).
    """
    return F.interpolate(low_res_masks, size, mode="bilinear", align_corners=False) > 0
