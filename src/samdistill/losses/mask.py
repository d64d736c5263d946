"""Mask terms: functions of logits and ground truth. Those that take ``valid`` give a mean over the valid masks."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def _mean(per_mask: Float[Tensor, " n"], valid: Bool[Tensor, " n"] | None) -> Float[Tensor, ""]:
    if valid is None:
        return per_mask.mean()
    return torch.where(valid, per_mask, 0).sum() / valid.sum().clamp(min=1)


def mask_bce(
    logits: Float[Tensor, "n h w"], target: Float[Tensor, "n h w"], valid: Bool[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """Binary cross-entropy per pixel, averaged over each mask and then over the valid masks. Targets in 0..1."""
    return _mean(F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1), valid)


def mask_dice(
    logits: Float[Tensor, "n h w"], target: Float[Tensor, "n h w"], valid: Bool[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """1 - soft Dice with one pixel of smoothing (Milletari et al., V-Net, 2016, eq. 3 with the plain denominator)."""
    probability, target = logits.sigmoid().flatten(1), target.flatten(1)
    overlap = (probability * target).sum(1)
    return _mean(1 - (2 * overlap + 1) / (probability.sum(1) + target.sum(1) + 1), valid)


def iou_mse(
    predicted: Float[Tensor, " n"],
    logits: Float[Tensor, "n h w"],
    target: Float[Tensor, "n h w"],
    valid: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Squared error of the predicted IoU against the IoU the thresholded mask really has (SAM, section 3 and A)."""
    inside, wanted = (logits > 0).flatten(1), (target > 0.5).flatten(1)
    union = (inside | wanted).sum(1).clamp(min=1)
    return _mean((predicted - (inside & wanted).sum(1) / union) ** 2, valid)


def soft_dice(probability: Float[Tensor, "*n p"], target: Float[Tensor, "*n p"]) -> Float[Tensor, "*n"]:
    """1 - Dice with squared denominators, as V-Net has them, and one pixel of smoothing: over the p pixels of a mask.

    It equals |p - t|^2 over |p|^2 + |t|^2 + 1, zero for the target alone. The plain denominator of ``mask_dice`` would
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
