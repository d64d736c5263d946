"""Tokens of encoded phrases, and padding."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def end_token(tokens: Float[Tensor, "p t c"], mask: Int[Tensor, "p t"]) -> Float[Tensor, "p c"]:
    """Return the last token of each phrase that is not padding, which is the end token of CLIP's tokenizers.

    Args:
        tokens: Features of the tokens.
        mask: 1 for tokens, 0 for padding on the right. Every phrase has a token.
    """
    return tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1]


def follow_padding(model: nn.Module) -> None:
    """Make the text encoders in ``model`` attend to padding if their configuration has ``attend_padding``.

    transformers' ``Sam3LiteTextTextModel`` always masks padding, but EfficientSAM3's models were trained without a
    mask. A hook therefore removes the mask and gives padding the id 0.

    Args:
        model: A ``TextStudent`` or a ``Sam3LiteTextModel``, or any other model, which is not changed.
    """
    # imported here, because importing transformers imports the students, which import this module
    from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextTextModel

    for module in model.modules():
        if isinstance(module, Sam3LiteTextTextModel) and getattr(module.config, "attend_padding", False):
            module.register_forward_pre_hook(_without_mask, with_kwargs=True)


def _without_mask(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask = given.get("attention_mask")
    if mask is None:
        return args, given
    return args, given | {"input_ids": given["input_ids"] * mask, "attention_mask": None}
