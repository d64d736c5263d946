"""Asking transformers' SAM 3: one encoded image for many questions, each answered as if it were asked alone."""

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

from ..types import DetectorOutput

T = TypeVar("T")


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
    """While open, whoever calls ``module`` gets ``change`` of what it returned."""
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
    forward: Callable[..., Any],
    encoder: nn.Module,
    vision: Any,
    image: Int[Tensor, " p"] | None,
    text: Float[Tensor, "p t c"],
    attention_mask: Int[Tensor, "p t"] | None,
    boxes: Float[Tensor, "p k 4"] | None = None,
    labels: Int[Tensor, "p k"] | None = None,
    enrich: Callable[[Any, Int[Tensor, " n"]], Float[Tensor, "n k c"]] | None = None,
) -> DetectorOutput:
    """What a SAM 3 answers to p questions about the images of ``vision``, graph attached, in the questions' order.

    forward: of ``Sam3Model`` or ``Sam3LiteTextModel``; encoder: its ``detr_encoder``. image: which image each question
    is about; None where there is one question per image. text: what its ``get_text_features`` projected. boxes,
    labels: exemplars, -10 for padding. enrich: from what the encoder returned for some questions, and which these are,
    to the tokens that the decoders then read in place of its last hidden state.

    transformers gives every question of a call the box encoder's extra token as soon as one of them shows a box.
    Questions in words and questions with boxes are therefore asked apart: no answer depends on what else is asked.
    """
    groups = _groups(len(text), labels, boxes, text.device)
    parts = []
    for rows in groups:
        whole = len(rows) == len(text)
        about = rows if image is None else image[rows]
        shown = boxes is not None and (labels is None or bool((labels[rows] != _PADDING).any()))
        with rewritten(encoder, partial(_enriched, rows, enrich)), recorded(encoder) as seen:
            out = forward(
                vision_embeds=vision if image is None and whole else take_images(vision, about),
                text_embeds=BaseModelOutputWithPooling(pooler_output=text if whole else text[rows]),
                attention_mask=None if attention_mask is None else attention_mask[rows],
                input_boxes=boxes[rows] if shown else None,
                input_boxes_labels=labels[rows] if shown and labels is not None else None,
                return_dict=True,
            )  # fmt: skip
        parts.append((out, seen.output.last_hidden_state))
    order = torch.cat(groups).argsort()

    def joined(pick: Callable[[Any, Tensor], Tensor]) -> Tensor:
        found = [pick(out, tokens) for out, tokens in parts]
        return found[0] if len(found) == 1 else torch.cat(found)[order]

    fpn = tuple(vision.fpn_hidden_states[:-1])
    return DetectorOutput(
        joined(lambda out, _: out.pred_masks),
        joined(lambda out, _: out.pred_boxes),
        joined(lambda out, _: out.pred_logits),
        joined(lambda out, _: out.presence_logits),
        joined(lambda out, _: out.semantic_seg),
        fpn,
        joined(lambda _, tokens: tokens).transpose(1, 2).unflatten(2, fpn[-1].shape[-2:]),
    )


def _enriched(about: Int[Tensor, " n"], enrich: Callable[[Any, Int[Tensor, " n"]], Tensor] | None, output: Any) -> Any:
    if enrich is not None:
        output.last_hidden_state = enrich(output, about)
    return output


_PADDING = -10


def _groups(
    count: int, labels: Int[Tensor, "p k"] | None, boxes: Tensor | None, device: torch.device
) -> list[Int[Tensor, " n"]]:
    """Rows in words alone and rows that show a box; one group where all are alike."""
    every = torch.arange(count, device=device)
    if boxes is None or labels is None:
        return [every]
    shown = (labels != _PADDING).any(1)
    return [rows for rows in (every[~shown], every[shown]) if len(rows)] or [every]
