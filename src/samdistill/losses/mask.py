"""Mask terms: functions of logits and soft targets, in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def soft_dice(probability: Float[Tensor, "*n p"], target: Float[Tensor, "*n p"]) -> Float[Tensor, "*n"]:
    """1 - Dice with squared denominators, as V-Net has them, and one pixel of smoothing: over the p pixels of a mask.

    It equals |p - t|^2 over |p|^2 + |t|^2 + 1, zero for the target alone. The plain denominator |p| + |t| would
    push a soft target's student to 0 or 1.
    """
    squares = probability.square().sum(-1) + target.square().sum(-1)
    return (probability - target).square().sum(-1) / (squares + 1)


def soft_focal(
    logits: Float[Tensor, "*n"], target: Float[Tensor, "*n"], gamma: float, alpha: float | None = None
) -> Float[Tensor, "*n"]:
    """``a |t - p|^gamma BCE(p, t)`` of each pixel in float32, targets t in 0..1, p the sigmoid of the logit.

    Where t is 0 or 1 this is the focal loss (Lin et al., 2017, eq. 4 and 5). For t between it is the quality focal loss
    (Li et al., 2020, eq. 5), which for a gamma above 0 is zero at p = t and nowhere else. a: alpha for t = 1, 1 - alpha
    for t = 0, linear between; None leaves it out. gamma 0 is the balanced cross-entropy.
    """
    logits, target = logits.float(), target.float()
    gap = (logits.sigmoid() - target).abs()
    some = gap > 0
    # apart at 0: the slope of a power below 1 is infinite there, and 0 times that is NaN
    focus = torch.where(some, torch.where(some, gap, 1.0) ** gamma, 0.0**gamma)
    loss = focus * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return loss if alpha is None else loss * (alpha * target + (1 - alpha) * (1 - target))


def soft_mask_loss(logits: Float[Tensor, "n h w"], target: Float[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    """Dice + binary cross-entropy of each mask against probabilities, in float32. Both are least at the target itself.

    Dice is ``soft_dice``. The cross-entropy of a soft target is never below the target's own entropy.
    """
    logits, target = logits.float().flatten(1), target.float().flatten(1)
    dice = soft_dice(logits.sigmoid(), target)
    return dice + F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
