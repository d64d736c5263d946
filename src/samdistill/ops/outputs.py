"""Asking transformers' SAM 3: one encoded image for many questions, each answered as the original SAM 3 answers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..reading import running
from ..types import DetectorOutput

T = TypeVar("T")
PADDING = -10
"""Label of a box that only fills the batch (transformers' convention)."""


@dataclass
class Recorded:
    """What a module returned when it last ran; None before. Graph attached."""

    output: Any = None


@contextmanager
def recorded(module: nn.Module) -> Iterator[Recorded]:
    """While open, keep what ``module`` returns each time it is called, as it is: nothing is detached or copied."""
    holder = Recorded()
    handle = module.register_forward_hook(lambda _, args, output: setattr(holder, "output", output))
    try:
        yield holder
    finally:
        handle.remove()


@contextmanager
def rewritten(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """While open, calls of ``module`` return ``change`` of its output."""
    handle = module.register_forward_hook(lambda _, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def take_images(vision: T, index: Int[Tensor, " p"]) -> T:
    """The features of image ``index[i]`` as the i-th of a batch of p, so that one encoded image serves many questions.

    vision: what a SAM 3 vision encoder returned, for b images. The result is of the same class and holds what the
    heads read: ``fpn_hidden_states``, gathered, and ``fpn_position_encoding``, which is the same for every image and
    therefore expanded without a copy. Whatever else ``vision`` carries is left out.
    """
    return type(vision)(
        fpn_hidden_states=tuple(level.index_select(0, index) for level in vision.fpn_hidden_states),
        fpn_position_encoding=tuple(p[:1].expand(len(index), -1, -1, -1) for p in vision.fpn_position_encoding),
    )


def ask(
    model: Any,
    vision: Any,
    image: Int[Tensor, " p"] | None,
    text: Float[Tensor, "p t c"],
    attention_mask: Int[Tensor, "p t"] | None,
    boxes: Float[Tensor, "p k 4"] | None = None,
    labels: Int[Tensor, "p k"] | None = None,
    forward: Callable[..., Any] | None = None,
    enrich: Callable[[Any], Float[Tensor, "p n c"]] | None = None,
) -> DetectorOutput:
    """What a SAM 3 answers to p questions about the images of ``vision``, graph attached, as the original does.

    The original runs the geometry encoder for every question: one without a box still carries its CLS token.
    transformers skips it when no box is given, which changes every output (docs/detection.md has the figures).
    Hence a question without a box is given one padding box, which attention never sees.

    Args:
        model: a ``Sam3Model`` or ``Sam3LiteTextModel``.
        vision: what its vision encoder returned for b images.
        image: the image each question is about, 0..b-1; None where there is one question per image.
        text: what its ``get_text_features`` projected.
        attention_mask: 1 for tokens, 0 for padding.
        boxes: exemplars, normalised cxcywh. None or k = 0: questions in words alone.
        labels: 1 like this, 0 not like this, -10 padding; None where every box is a positive example.
        forward: what is called in place of ``model``; for a subclass whose own ``forward`` calls this function.
        enrich: maps what the DETR encoder returned to the tokens that the decoders read instead of its last state.
    """
    if boxes is None or not boxes.shape[1]:
        boxes = text.new_zeros(len(text), 1, 4)
        labels = torch.full(boxes.shape[:2], PADDING, device=boxes.device)
    encoder = model.detr_encoder
    with (
        running(model), rewritten(encoder, partial(_enriched, enrich)), recorded(encoder) as seen,
        _own_precision(model.geometry_encoder, text.device.type),
    ):  # fmt: skip
        out = (forward or model)(
            vision_embeds=vision if image is None else take_images(vision, image),
            text_embeds=BaseModelOutputWithPooling(pooler_output=text),
            attention_mask=attention_mask,
            input_boxes=boxes,
            input_boxes_labels=labels,
            return_dict=True,
        )
    fpn = tuple(vision.fpn_hidden_states[:-1])
    grid = seen.output.last_hidden_state.transpose(1, 2).unflatten(2, fpn[-1].shape[-2:])
    return DetectorOutput(
        out.pred_masks, out.pred_boxes, out.pred_logits, out.presence_logits, out.semantic_seg, fpn, grid
    )


def _enriched(enrich: Callable[[Any], Tensor] | None, output: Any) -> Any:
    if enrich is not None:
        output.last_hidden_state = enrich(output)
    return output


@contextmanager
def _own_precision(module: nn.Module, device: str) -> Iterator[None]:
    """While open, ``module`` computes in the precision of its weights, whatever autocast says.

    transformers pools the features of boxes in float16 where they are bfloat16, since ``roi_align`` knows no bfloat16;
    autocast to bfloat16 refuses to concatenate float16.
    """
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype, off = next(module.parameters()).dtype, torch.autocast(device, enabled=False)

    def cast(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(map(cast, value))
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def enter(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        off.__enter__()
        return cast(args), {name: cast(value) for name, value in given.items()}

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        off.__exit__(None, None, None)

    handles = (
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
