"""Box conversions against torchvision."""

from __future__ import annotations

import torch
from torchvision.ops import box_convert

from samdistill.ops.boxes import xyxy_to_xywh


def test_xywh_is_torchvisions() -> None:
    corners = torch.rand(20, 2, 2, generator=torch.Generator().manual_seed(0)).sort(1).values
    boxes = corners.flatten(1) * 100
    assert torch.equal(xyxy_to_xywh(boxes), box_convert(boxes, "xyxy", "xywh"))
    assert xyxy_to_xywh(boxes.view(4, 5, 4)).shape == (4, 5, 4)
    assert xyxy_to_xywh(torch.tensor([[3.0, 2, 12, 9]])).tolist() == [[3, 2, 9, 7]]
