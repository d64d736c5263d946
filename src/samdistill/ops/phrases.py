"""Tokens of encoded phrases."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def end_token(tokens: Float[Tensor, "p t c"], mask: Int[Tensor, "p t"]) -> Float[Tensor, "p c"]:
    """Return the last token of each phrase that is not padding, which is the end token of CLIP's tokenizers.

    Args:
        tokens: Features of the tokens.
        mask: 1 for tokens, 0 for padding on the right. Every phrase has a token.
    """
    return tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1]
