"""Overlap of boxes against torchvision, and by hand where torchvision divides zero by zero."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou, generalized_box_iou_loss

from samdistill.ops.boxes import giou, iou


def boxes(count: int = 20, seed: int = 0) -> torch.Tensor:
    """Valid xyxy boxes in 0..1."""
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed))
    return corners.sort(1).values.flatten(1)


def pairwise_giou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return giou(first[..., :, None, :], second[..., None, :, :])


def test_giou_is_torchvisions() -> None:
    first, second = boxes(20, 1), boxes(20, 2)
    torch.testing.assert_close(pairwise_giou(first, second), generalized_box_iou(first, second))
    torch.testing.assert_close(1 - giou(first, second), generalized_box_iou_loss(first, second), rtol=1e-4, atol=1e-5)
    batched = pairwise_giou(first.view(2, 10, 4), second.view(2, 10, 4)[:, :3])
    torch.testing.assert_close(batched[1], generalized_box_iou(first[10:], second[10:13]))


def test_iou_is_torchvisions_and_0_without_an_area() -> None:
    first, second = boxes(20, 1), boxes(20, 2)
    torch.testing.assert_close(iou(first[:, None], second[None]), box_iou(first, second))
    point = torch.tensor([0.5, 0.5, 0.5, 0.5])
    assert iou(point, point).item() == 0 and iou(first[0], point).item() == 0


def test_giou_inside_a_box_is_its_iou() -> None:
    """The hull of a box and a box inside it is the outer one: nothing is taken off."""
    outer = torch.tensor([[0.1, 0.1, 0.9, 0.8]])
    inner = torch.tensor([[0.2, 0.3, 0.5, 0.6]])
    torch.testing.assert_close(pairwise_giou(outer, inner), box_iou(outer, inner))


def test_giou_by_hand() -> None:
    unit = torch.tensor([0.0, 0, 1, 1])
    apart = torch.tensor([2.0, 0, 3, 1])  # union 2, hull 3
    across = torch.tensor([0.5, 0.5, 1.5, 1.5])  # overlap 1/4, union 7/4, hull 9/4
    assert giou(unit, unit).item() == 1
    assert giou(unit, apart).item() == pytest.approx(-1 / 3)
    assert giou(unit, across).item() == pytest.approx(1 / 7 - 2 / 9)
    reversed_across = torch.tensor([1.5, 0.5, 0.5, 1.5])
    assert giou(unit, reversed_across).item() == giou(unit, across).item()


def test_no_box_gives_nan_or_an_endless_gradient() -> None:
    odd = torch.tensor(
        [
            [0.5, 0.5, 0.5, 0.5],
            [0.5, 0.5, 0.5, 0.5],
            [0.2, 0.2, 0.2, 0.9],
            [0.9, 0.2, 0.2, 0.2],
            [0.9, 0.9, 0.1, 0.1],
            [0.1, 0.9, 0.9, 0.1],
            [0, 0, 1e-30, 1e-30],
            [-3, -2, 5, 1e-20],
        ]
    )
    first, second = odd.clone().requires_grad_(), odd.clone().requires_grad_()
    value = pairwise_giou(first, second)
    value.sum().backward()
    assert value.isfinite().all() and value.min() >= -1 and value.max() <= 1 + 1e-6
    assert first.grad.isfinite().all() and second.grad.isfinite().all()
    assert value[0, 1] == 0  # twice the same point: no area, no hull
    assert value[0, 4].item() == pytest.approx(0)  # a point inside a box: IoU 0, nothing of the hull is empty
    assert value[4, 5].item() == pytest.approx(1)  # the same box, each reversed in its own way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_giou_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    first, second = (boxes(20, seed).to(dtype) * 300 for seed in (3, 4))  # areas overflow float16
    value = giou(first, second)
    assert value.dtype == torch.float32
    assert torch.equal(value, giou(first.float(), second.float()))
