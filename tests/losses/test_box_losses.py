"""Box terms by hand and against torchvision."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import generalized_box_iou_loss

from samdistill.losses.box import box_giou, box_l1


def boxes(seed: int) -> torch.Tensor:
    corners = torch.rand(2, 6, 2, 2, generator=torch.Generator().manual_seed(seed))
    return corners.sort(2).values.flatten(2)


def test_l1_is_summed_over_the_edges() -> None:
    predicted = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]])
    target = torch.tensor([[0.2, 0.2, 0.1, 0.8], [0, 0, 1, 1]])
    assert box_l1(predicted, target).tolist() == pytest.approx([0.7, 0])
    wanted = torch.nn.functional.l1_loss(boxes(0), boxes(1), reduction="none").sum(-1)
    torch.testing.assert_close(box_l1(boxes(0), boxes(1)), wanted)


def test_boxes_apart_are_pulled_together() -> None:
    """The point of GIoU: IoU alone has no gradient here."""
    predicted, target = torch.tensor([0.0, 0.0, 0.1, 0.1], requires_grad=True), torch.tensor([0.7, 0.7, 0.9, 0.9])
    before = box_giou(predicted, target)
    torch.testing.assert_close(before, generalized_box_iou_loss(predicted, target), rtol=1e-4, atol=1e-5)
    before.backward()
    assert (predicted.grad[2:] < 0).all()
    assert box_giou(predicted.detach() - 0.01 * predicted.grad, target) < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    first, second = boxes(0).to(dtype), boxes(1).to(dtype)
    assert torch.equal(box_l1(first, second), box_l1(first.float(), second.float()))
    assert box_l1(first, second).dtype == torch.float32
