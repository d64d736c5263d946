"""Box loss terms, one float32 value per pair of boxes. Boxes are xyxy, normalised to 0..1."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..ops.boxes import giou


def box_l1(predicted: Float[Tensor, "*n 4"], target: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Return the absolute error, summed over the four coordinates as in DETR (Carion et al., 2020)."""
    return (predicted.float() - target.float()).abs().sum(-1)


def box_giou(predicted: Float[Tensor, "*n 4"], target: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Return 1 - generalised IoU, in 0..2 (Rezatofighi et al., 2019)."""
    return 1 - giou(predicted, target)
