"""Run transformers' SAM 3 on images with several questions each, with the outputs of the original SAM 3."""

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
"""Label of a padding box (transformers' convention)."""


@dataclass
class Recorded:
    """The last output of a module, with its graph.

    Attributes:
        output: What the module returned in its last call, or None before the first one.
    """

    output: Any = None


@contextmanager
def recorded(module: nn.Module) -> Iterator[Recorded]:
    """Record the output of every call of ``module`` inside a ``with`` block. The output is not detached or copied.

    Yields:
        The record, which has the output of the last call.
    """
    holder = Recorded()
    handle = module.register_forward_hook(lambda _, args, output: setattr(holder, "output", output))
    try:
        yield holder
    finally:
        handle.remove()


@contextmanager
def rewritten(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Replace the output of every call of ``module`` inside a ``with`` block.

    Args:
        module: The module.
        change: Function from the module's output to the output that its caller gets.
    """
    handle = module.register_forward_hook(lambda _, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def take_images(vision: T, index: Int[Tensor, " p"]) -> T:
    """Gather the features of images, so that one encoded image serves several questions.

    Args:
        vision: Output of a SAM 3 vision encoder for b images.
        index: Images to gather, 0..b-1, of shape (p,). An image may occur several times.

    Returns:
        A batch of p images, of the same class as ``vision``, with the fields that the heads read:
        ``fpn_hidden_states``, which are gathered, and ``fpn_position_encoding``, which is the same for every image and
        is expanded without a copy. Other fields of ``vision`` are not set.
    """
    return type(vision)(
        fpn_hidden_states=tuple(level.index_select(0, index) for level in vision.fpn_hidden_states),
        fpn_position_encoding=tuple(p[:1].expand(index.shape[0], -1, -1, -1) for p in vision.fpn_position_encoding),
    )


def trunk_map(vision: Any) -> Float[Tensor, "b d gh gw"]:
    """Return the output of the trunk in the output of a SAM 3 vision encoder, on the grid of its third level."""
    return vision.last_hidden_state.transpose(1, 2).unflatten(2, vision.fpn_hidden_states[2].shape[-2:])


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
    """Run a SAM 3 on p questions about encoded images, with the outputs of the original SAM 3. The graph is kept.

    The original runs the geometry encoder for every question, and a question without a box still has that encoder's CLS
    token. transformers skips the geometry encoder when no box is given, which changes every output (figures in
    docs/detection.md). A question without a box therefore gets one padding box, which is masked in attention.

    Args:
        model: A ``Sam3Model`` or ``Sam3LiteTextModel``.
        vision: Output of its vision encoder for b images.
        image: Index of each question's image, 0..b-1, of shape (p,). None if there is one question per image.
        text: Projected text features from its ``get_text_features``, of shape (p, t, c).
        attention_mask: 1 for tokens and 0 for padding, of shape (p, t).
        boxes: Exemplar boxes, normalised cxcywh, of shape (p, k, 4). None or k = 0 for questions in words only.
        labels: 1 for a positive exemplar, 0 for a negative one, -10 for padding, of shape (p, k). None if all are
            positive.
        forward: Function to call in place of ``model``. A subclass whose ``forward`` calls this function needs it.
        enrich: Function from the output of the DETR encoder to the tokens that the decoders read in place of its last
            hidden state.

    Returns:
        The outputs for p questions, and the features of b images.

    Raises:
        UserError: The model cannot run, for example because its configuration does not fit it.
    """
    if boxes is None or not boxes.shape[1]:
        boxes = text.new_zeros(text.shape[0], 1, 4)
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
    """Run ``module`` in the precision of its weights, also under autocast.

    If the features are bfloat16, transformers pools them for boxes in float16, because ``roi_align`` does not support
    bfloat16. Autocast to bfloat16 cannot concatenate float16 tensors.
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
