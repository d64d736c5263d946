"""Loss terms of text distillation, in float32, on tokens after the projection.

Padding does not count. A term is a mean over the tokens of a phrase, then over phrases, so a long phrase counts as much
as a short one. The terms on the end token repeat it with a weight that does not depend on the length of the phrase.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...losses.maps import directions
from ...ops.phrases import end_token
from ...registry import TermTable

TEXT_TERMS = TermTable("text loss")
"""Terms of text distillation, functions of (predicted, target, mask)."""


@TEXT_TERMS.term("mse", 1.0)
def masked_mse(
    predicted: Float[Tensor, "p t c"], target: Float[Tensor, "p t c"], mask: Int[Tensor, "p t"]
) -> Float[Tensor, ""]:
    """Tokens: squared error per channel; mean over the tokens of a phrase, then over phrases, as published."""
    return _per_phrase(_squared(predicted, target), mask)


@TEXT_TERMS.term("cosine", 1.0)
def masked_cosine(
    predicted: Float[Tensor, "p t c"], target: Float[Tensor, "p t c"], mask: Int[Tensor, "p t"]
) -> Float[Tensor, ""]:
    """Tokens: 1 - cosine; mean over the tokens of a phrase, then over phrases. The value is in 0..2."""
    return _per_phrase(1 - token_cosine(predicted, target), mask)


@TEXT_TERMS.term("pooled_mse", 1.0)
def pooled_mse(
    predicted: Float[Tensor, "p t c"], target: Float[Tensor, "p t c"], mask: Int[Tensor, "p t"]
) -> Float[Tensor, ""]:
    """End token: squared error per channel; mean over phrases."""
    return _squared(end_token(predicted, mask), end_token(target, mask)).mean()


@TEXT_TERMS.term("pooled_cosine", 1.0)
def pooled_cosine(
    predicted: Float[Tensor, "p t c"], target: Float[Tensor, "p t c"], mask: Int[Tensor, "p t"]
) -> Float[Tensor, ""]:
    """End token: 1 - cosine; mean over phrases. The value is in 0..2."""
    return (1 - token_cosine(end_token(predicted, mask)[:, None], end_token(target, mask)[:, None])).mean()


def token_cosine(first: Float[Tensor, "p t c"], second: Float[Tensor, "p t c"]) -> Float[Tensor, "p t"]:
    """Return the cosine of each pair of tokens. With a vector of zeros it is 0, without gradient."""
    one, other = (directions(tokens.float().transpose(1, 2)) for tokens in (first, second))
    return (one * other).sum(1)


def phrase_means(values: Float[Tensor, "p t"], mask: Int[Tensor, "p t"]) -> Float[Tensor, " p"]:
    """Return the mean of each phrase's values over its tokens."""
    return torch.where(mask.bool(), values, 0.0).sum(1) / mask.sum(1)


def _per_phrase(values: Float[Tensor, "p t"], mask: Int[Tensor, "p t"]) -> Float[Tensor, ""]:
    return phrase_means(values, mask).mean()


def _squared(predicted: Float[Tensor, "*p c"], target: Float[Tensor, "*p c"]) -> Float[Tensor, "*p"]:
    """Return the mean over channels. Raises ``ValueError`` if shapes differ, because broadcasting would hide it."""
    if predicted.shape != target.shape:
        raise ValueError(f"tokens {tuple(predicted.shape)} and {tuple(target.shape)} do not match")
    return (predicted.float() - target.float()).square().mean(-1)
