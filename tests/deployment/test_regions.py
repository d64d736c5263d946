"""Pooling of boxes with matrix products, against torchvision's ``roi_align``."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import roi_align

from samdistill.deployment.regions import pool_aligned, pool_by_products


@pytest.mark.parametrize(("height", "width", "size"), [(5, 6, 3), (16, 16, 7), (14, 28, 7), (72, 72, 7), (1, 3, 7)])
def test_both_forms_give_the_features_of_torchvision(height: int, width: int, size: int) -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, height, width, generator=draw)
    ends = torch.rand(2, 20, 2, 2, generator=draw).sort(2).values * torch.tensor([width, height])
    corners = ends.flatten(2)
    edges = [[0, 0, width, height], [width - 0.1, height - 0.1, width, height], [-1.5, -1.5, 2, 2], [0, 0, 0, 0],
             [width, height, width, height]]  # fmt: skip
    corners[0, : len(edges)] = torch.tensor(edges)
    wanted = roi_align(features, list(corners), size)
    for pool in (pool_aligned, pool_by_products):
        torch.testing.assert_close(pool(features, corners, size), wanted, rtol=1e-5, atol=1e-4)


def test_a_box_of_one_bin_is_the_mean_of_its_cells() -> None:
    """By hand: samples at 0.5 and 1.5 in each direction lie half way between two cells."""
    features = torch.arange(16.0).view(1, 1, 4, 4)
    found = pool_by_products(features, torch.tensor([[[0.0, 0.0, 2.0, 2.0]]]), 1)
    assert found.item() == pytest.approx(5.0)  # rows and columns 0.5 and 1.5: mean row 1, mean column 1, so 4 + 1
