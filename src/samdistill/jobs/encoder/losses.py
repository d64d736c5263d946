"""Terms between two feature grids, over the cells that lie on the image and not on padding.

Both follow EfficientSAM3's encoder distillation. Everything is computed in float32, so half-precision features give
the loss and the gradient of the same numbers. An image without a valid cell contributes 0 to the mean over the batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...losses.maps import directions
from ...registry import TermTable

FEATURE_LOSSES = TermTable("feature loss")
"""Terms of encoder distillation: functions of (predicted, target, valid)."""


@FEATURE_LOSSES.term("mse", 1.0)
def masked_mse(
    predicted: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], valid: Bool[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """Features of a valid cell: squared error summed over channels; mean over the cells of an image, then over images.

    The published normalisation: c times a per-element MSE.
    """
    _same_shape(predicted, target, valid)
    with torch.autocast(predicted.device.type, enabled=False):
        error = torch.where(valid[:, None], predicted.float() - target.float(), 0.0)
        return _per_image((error**2).sum(1), valid)


@FEATURE_LOSSES.term("cosine", 1.0)
def masked_cosine(
    predicted: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], valid: Bool[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """Features of a valid cell: 1 - cosine over channels; mean over the cells of an image, then over images.

    In 0..2. Averaged per image before the batch, as ``masked_mse`` is: padding does not change an image's weight. A
    vector shorter than 1e-6 has no direction: it counts as cosine 0, without a gradient (one over its length).
    """
    _same_shape(predicted, target, valid)
    with torch.autocast(predicted.device.type, enabled=False):
        keep = valid[:, None]
        first, second = (directions(torch.where(keep, x.float(), 0.0)) for x in (predicted, target))
        cosine = (first * second).sum(1)
        return _per_image(torch.where(valid, 1 - cosine, 0.0), valid)


def _per_image(cells: Float[Tensor, "b h w"], valid: Bool[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Mean of each image's valid cells (the others hold 0), then over the batch."""
    return (cells.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)).mean()


def _same_shape(predicted: Tensor, target: Tensor, valid: Tensor) -> None:
    """Broadcasting would hide a wrong grid."""
    if predicted.shape != target.shape or valid.shape != (predicted.shape[0], *predicted.shape[2:]):
        raise ValueError(
            f"features {tuple(predicted.shape)} and {tuple(target.shape)} with valid {tuple(valid.shape)} do not match"
        )
