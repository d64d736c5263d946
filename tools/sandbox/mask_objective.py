"""Mask losses of the sandbox's teachers, from logits and ground truth. With ``valid``, a mean over valid masks."""

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
    """Return the binary cross-entropy, averaged over the pixels of a mask, then over valid masks. Targets in 0..1."""
    return _mean(F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1), valid)


def mask_dice(
    logits: Float[Tensor, "n h w"], target: Float[Tensor, "n h w"], valid: Bool[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """Return 1 - soft Dice with one pixel of smoothing.

    Source:
        Milletari et al., V-Net, 2016, equation 3, with a denominator without squares.
    """
    probability, target = logits.sigmoid().flatten(1), target.flatten(1)
    overlap = (probability * target).sum(1)
    return _mean(1 - (2 * overlap + 1) / (probability.sum(1) + target.sum(1) + 1), valid)


def iou_mse(
    predicted: Float[Tensor, " n"],
    logits: Float[Tensor, "n h w"],
    target: Float[Tensor, "n h w"],
    valid: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Return the squared error of the predicted IoU against the IoU of the thresholded mask.

    Source:
        Kirillov et al., Segment Anything, 2023, section 3 and appendix A.
    """
    inside, wanted = (logits > 0).flatten(1), (target > 0.5).flatten(1)
    union = (inside | wanted).sum(1).clamp(min=1)
    return _mean((predicted - (inside & wanted).sum(1) / union) ** 2, valid)
