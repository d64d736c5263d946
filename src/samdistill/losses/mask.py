"""Mask loss terms between logits and soft targets, in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def soft_dice(probability: Float[Tensor, "*n p"], target: Float[Tensor, "*n p"]) -> Float[Tensor, "*n"]:
    """Return the Dice loss with squared denominators over the p pixels of each mask, smoothed by one pixel.

    The loss is |p - t|^2 / (|p|^2 + |t|^2 + 1), the form of V-Net. It is zero only at p = t. With the denominator |p| +
    |t|, a soft target would push the student to 0 or 1.

    Args:
        probability: Probabilities p in 0..1.
        target: Soft targets t in 0..1.
    """
    squares = probability.square().sum(-1) + target.square().sum(-1)
    return (probability - target).square().sum(-1) / (squares + 1)


def soft_focal(
    logits: Float[Tensor, "*n"], target: Float[Tensor, "*n"], gamma: float, alpha: float | None = None
) -> Float[Tensor, "*n"]:
    """Return ``a |t - p|^gamma BCE(p, t)`` for each element in float32, where p is the sigmoid of the logit.

    With targets 0 and 1 this is the focal loss (Lin et al., 2017, eq. 4 and 5). With soft targets it is the quality
    focal loss (Li et al., 2020, eq. 5), which for gamma > 0 is zero only at p = t. With gamma 0 it is the balanced
    cross-entropy.

    Args:
        logits: Logits.
        target: Soft targets t in 0..1.
        gamma: Exponent of the focal factor.
        alpha: Weight a at t = 1. At t = 0 it is 1 - alpha, with linear interpolation between them. None for no weight.
    """
    logits, target = logits.float(), target.float()
    gap = (logits.sigmoid() - target).abs()
    some = gap > 0
    # 0 is handled apart, because the derivative of a power below 1 is infinite there, and 0 * inf is NaN
    focus = torch.where(some, torch.where(some, gap, 1.0) ** gamma, 0.0**gamma)
    loss = focus * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return loss if alpha is None else loss * (alpha * target + (1 - alpha) * (1 - target))


def soft_mask_loss(logits: Float[Tensor, "n h w"], target: Float[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    """Return ``soft_dice`` + binary cross-entropy of each mask, in float32. Both are smallest at the target.

    The cross-entropy with a soft target is at least the entropy of the target.

    Args:
        logits: Mask logits.
        target: Soft targets in 0..1.
    """
    logits, target = logits.float().flatten(1), target.float().flatten(1)
    dice = soft_dice(logits.sigmoid(), target)
    return dice + F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
