from __future__ import annotations

import pytest
import torch

from samdistill.metrics.masks import MaskScores, agreement


def strip(start: int, end: int) -> torch.Tensor:
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, start:end] = True
    return mask


def test_figures_by_hand() -> None:
    target = torch.stack([strip(0, 4)] * 4)
    predicted = torch.stack([strip(0, 4), strip(0, 3), strip(0, 8), strip(6, 9)])  # IoU 1, 0.75, 0.5, 0
    summary = MaskScores().update(predicted, target).summary()
    assert summary == pytest.approx({"miou": 2.25 / 4, "iou_50": 0.75, "iou_75": 0.5, "masks": 4})


def test_slots_that_pad_are_left_out() -> None:
    target = torch.stack([strip(0, 4), strip(0, 4), strip(0, 0), strip(0, 0)]).view(2, 2, 4, 10)
    predicted = torch.stack([strip(0, 4), strip(0, 2), strip(0, 9), strip(0, 0)]).view(2, 2, 4, 10)
    valid = torch.tensor([[True, True], [False, False]])
    assert MaskScores().update(predicted, target, valid).summary()["miou"] == pytest.approx(0.75)
    assert MaskScores().update(predicted, target, valid).summary()["masks"] == 2


def test_brute_force_and_merge_over_ranks() -> None:
    g = torch.Generator().manual_seed(0)
    predicted, target = (torch.rand(30, 6, 7, generator=g) > 0.4 for _ in range(2))
    ious = []
    for a, b in zip(predicted.tolist(), target.tolist(), strict=True):
        pairs = [(x, y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True)]
        ious.append(sum(x and y for x, y in pairs) / sum(x or y for x, y in pairs))
    whole = MaskScores().update(predicted, target)
    assert whole.summary()["miou"] == pytest.approx(sum(ious) / 30)
    assert whole.summary()["iou_50"] == pytest.approx(sum(i >= 0.5 for i in ious) / 30)
    ranks = [MaskScores().update(predicted[r::4], target[r::4]) for r in range(4)]
    assert MaskScores.merge(ranks).summary() == pytest.approx(whole.summary())
    assert MaskScores.merge([]).summary() == MaskScores().summary() == {}


def test_agreement_is_symmetric_and_full_with_itself() -> None:
    g = torch.Generator().manual_seed(1)
    first, second = (torch.rand(5, 6, 7, generator=g) > 0.5 for _ in range(2))
    assert agreement(first, second) == agreement(second, first)
    assert agreement(first, first)["miou"] == 1.0
    empty = torch.zeros(1, 6, 7, dtype=torch.bool)
    assert agreement(empty, empty)["miou"] == 1.0
    assert agreement(empty, ~empty)["miou"] == 0.0
