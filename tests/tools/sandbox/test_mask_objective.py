"""Cases small enough to compute by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mask_objective import iou_mse, mask_bce, mask_dice


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_bce_by_hand() -> None:
    logits = torch.tensor([[[0.0, logit(0.8)]], [[logit(0.1), logit(0.25)]]])
    target = torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]])
    first, second = -(math.log(0.5) + math.log(0.8)) / 2, -(math.log(0.9) + math.log(0.25)) / 2
    assert mask_bce(logits, target).item() == pytest.approx((first + second) / 2)
    assert mask_bce(logits, target, torch.tensor([False, True])).item() == pytest.approx(second)


def test_dice_by_hand() -> None:
    logits = torch.tensor([[[logit(0.5), logit(0.75)]], [[-100.0, -100.0]]])
    target = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])
    first = 1 - (2 * 0.5 + 1) / (1.25 + 1 + 1)
    assert mask_dice(logits, target, torch.tensor([True, False])).item() == pytest.approx(first)
    assert mask_dice(logits, target).item() == pytest.approx(first / 2)  # nothing predicted, nothing wanted: no loss


def test_dice_of_a_perfect_mask_is_zero_and_of_its_negative_nearly_one() -> None:
    target = (torch.arange(64).view(1, 8, 8) < 24).float()
    assert mask_dice(200 * target - 100, target).item() == pytest.approx(0, abs=1e-6)
    assert mask_dice(100 - 200 * target, target).item() == pytest.approx(1 - 1 / (40 + 24 + 1))


def test_iou_mse_by_hand() -> None:
    logits = torch.tensor([[[2.0, 2.0, -1.0, -1.0]], [[-1.0, -1.0, -1.0, -1.0]]])
    target = torch.tensor([[[0.0, 1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    predicted = torch.tensor([0.5, 0.25])
    first, second = (0.5 - 1 / 3) ** 2, 0.25**2
    assert iou_mse(predicted, logits, target).item() == pytest.approx((first + second) / 2)
    assert iou_mse(predicted, logits, target, torch.tensor([True, False])).item() == pytest.approx(first)


def test_masks_that_only_pad_change_nothing() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 4), (torch.rand(3, 4, 4) > 0.5).float()
    valid, scores = torch.tensor([True, False, True]), torch.rand(3)
    kept = valid.nonzero()[:, 0]
    for padded, alone in (
        (mask_bce(logits, target, valid), mask_bce(logits[kept], target[kept])),
        (mask_dice(logits, target, valid), mask_dice(logits[kept], target[kept])),
        (iou_mse(scores, logits, target, valid), iou_mse(scores[kept], logits[kept], target[kept])),
    ):
        torch.testing.assert_close(padded, alone)
    nothing = torch.zeros(3, dtype=torch.bool)
    logits.requires_grad_()
    total = mask_bce(logits, target, nothing) + mask_dice(logits, target, nothing)
    total.backward()
    assert total.item() == 0 and not logits.grad.any()


def test_gradients_reach_the_logits_and_the_predicted_iou() -> None:
    logits = torch.randn(2, 4, 4, requires_grad=True)
    scores = torch.rand(2, requires_grad=True)
    target = (torch.rand(2, 4, 4) > 0.5).float()
    (mask_bce(logits, target) + mask_dice(logits, target)).backward()
    assert (logits.grad != 0).all()
    logits.grad = None
    iou_mse(scores, logits, target).backward()
    assert (scores.grad != 0).all() and logits.grad is None  # the real IoU is a target, not a path
