"""Box conversions. ``xyxy``: left, top, right, bottom edge; ``xywh``: left, top edge, width, height."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def xyxy_to_xywh(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1)
