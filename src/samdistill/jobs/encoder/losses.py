"""Loss terms between two feature grids, over the cells that are not padding.

Both terms are those of EfficientSAM3's encoder distillation. They are computed in float32. An image without valid cells
counts as 0 in the mean over the batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...losses.maps import directions
from ...registry import TermTable

FEATURE_LOSSES = TermTable("feature loss")
"""Terms of encoder distillation, functions of (predicted, target, valid)."""


@FEATURE_LOSSES.term("mse", 1.0)
def masked_mse(
    predicted: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], valid: Bool[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """Features of a valid cell: squared error summed over channels; mean over the cells of an image, then over images.

    This is the published normalisation, c times the MSE per element.
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

    The value is in 0..2. As in ``masked_mse``, the mean over cells comes first, so padding does not change the weight
    of an image. The cosine with a vector shorter than 1e-6 is 0 without gradient, because the gradient is one over the
    length.
    """
    _same_shape(predicted, target, valid)
    with torch.autocast(predicted.device.type, enabled=False):
        keep = valid[:, None]
        first, second = (directions(torch.where(keep, x.float(), 0.0)) for x in (predicted, target))
        cosine = (first * second).sum(1)
        return _per_image(torch.where(valid, 1 - cosine, 0.0), valid)


def _per_image(cells: Float[Tensor, "b h w"], valid: Bool[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Average over each image's valid cells (others are 0), then over the batch."""
    return (cells.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)).mean()


def _same_shape(predicted: Tensor, target: Tensor, valid: Tensor) -> None:
    """Raise ``ValueError`` if shapes differ, because broadcasting would hide a wrong grid."""
    if predicted.shape != target.shape or valid.shape != (predicted.shape[0], *predicted.shape[2:]):
        raise ValueError(
            f"features {tuple(predicted.shape)} and {tuple(target.shape)} with valid {tuple(valid.shape)} do not match"
        )
