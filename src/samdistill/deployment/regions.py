"""Features of boxes, as SAM 3's geometry encoder pools them, in two forms that exported files can have."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import roi_align


def pool_aligned(
    features: Float[Tensor, "p c h w"], corners: Float[Tensor, "p n 4"], size: int
) -> Float[Tensor, "m c size size"]:
    """Pool the boxes of each map with ``torchvision.ops.roi_align``.

    Args:
        features: A map for each prompt.
        corners: Boxes of each prompt as left, top, right, bottom in cells of the map.
        size: Bins of a box in each direction.

    Returns:
        Features of all boxes, those of the first prompt first (m = p n).
    """
    prompts, count = corners.shape[:2]
    rows = torch.arange(prompts, device=corners.device, dtype=corners.dtype)[:, None].expand(prompts, count)
    table = torch.cat([rows.reshape(-1, 1), corners.flatten(0, 1)], 1)
    return roi_align(features, table, size)


def pool_by_products(
    features: Float[Tensor, "p c h w"], corners: Float[Tensor, "p n 4"], size: int
) -> Float[Tensor, "m c size size"]:
    """Pool boxes as ``pool_aligned`` does, with matrix products, for formats without ``roi_align``.

    A bin is the mean of bilinear samples on a grid, and its weights are a product of weights of rows and of columns.
    Boxes must not be larger than the map. No
    tensor has more than four axes, because Core ML has at most five.

    Args:
        features: A map for each prompt.
        corners: Boxes of each prompt as left, top, right, bottom in cells of the map.
        size: Bins of a box in each direction.

    Returns:
        Features of all boxes, those of the first prompt first (m = p n).

    Example:
        >>> features, box = torch.rand(1, 2, 5, 6), torch.tensor([[[0.5, 1.0, 4.5, 3.25]]])
        >>> torch.allclose(pool_by_products(features, box, 3), pool_aligned(features, box, 3), atol=1e-6)
        True
    """
    (prompts, channels, height, width), count = features.shape, corners.shape[1]
    left, top, right, bottom = corners.flatten(0, 1).unbind(-1)
    rows, columns = _weights(top, bottom, height, size), _weights(left, right, width, size)
    table = features.transpose(1, 2).reshape(prompts, height, channels * width)
    narrow = rows.reshape(prompts, count * size, height) @ table
    pooled = narrow.reshape(prompts * count, size * channels, width) @ columns.transpose(1, 2)
    return pooled.reshape(prompts * count, size, channels, size).transpose(1, 2)


def _weights(
    first: Float[Tensor, " m"], last: Float[Tensor, " m"], cells: int, size: int
) -> Float[Tensor, "m size cells"]:
    """Return the weight of each cell in each bin, in one direction.

    A bin has as many samples as the whole number of cells that covers it. Samples up to one cell outside of the map are
    moved to its border, those beyond it are 0 (torchvision's ``roi_align`` with ``sampling_ratio=-1``).
    """
    bins = torch.arange(size, device=first.device, dtype=first.dtype)
    most = math.ceil(cells / size) + 1  # one more than fits, as sums are rounded
    numbers = torch.arange(most, device=first.device, dtype=first.dtype)
    step = ((last - first).clamp(min=1.0) / size)[..., None, None]
    samples = step.ceil()
    places = first[..., None, None] + step * (bins[:, None] + (numbers + 0.5) / samples)
    counted = (numbers < samples) & (places >= -1.0) & (places <= cells)
    apart = places.clamp(0.0, cells - 1.0)[..., None] - torch.arange(cells, device=first.device, dtype=first.dtype)
    shares = (1.0 - apart.abs()).clamp(min=0.0) * counted[..., None]
    return shares.sum(-2) / samples
