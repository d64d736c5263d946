"""cgF1 and its factors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from samdistill.metrics.concepts import IOU_THRESHOLDS, ConceptScores, mask_ious


def pair(*rows: list[float], objects: int | None = None) -> torch.Tensor:
    """IoU of predictions (rows) with objects (columns)."""
    return torch.tensor(rows).reshape(len(rows), objects if objects is not None else len(rows[0]))


NOTHING = torch.zeros(0, 0)


def test_figures_by_hand() -> None:
    scores = ConceptScores()
    scores = scores.update(pair([0.92, 0.0], [0.0, 0.61], [0.3, 0.2]))  # two objects, two hits, one stray prediction
    scores = scores.update(torch.zeros(0, 1))  # an object, nothing predicted
    scores = scores.update(torch.zeros(2, 0))  # no object, two predictions
    scores = scores.update(NOTHING)  # no object, nothing predicted
    scores = scores.update(NOTHING)
    # The positive pairs hold 3 objects and 3 predictions, so f1 = 2 tp / (2 tp + (3 - tp) + (3 - tp)) = tp / 3.
    # 0.92 counts at 0.50 .. 0.90 (9 thresholds), 0.61 at 0.50, 0.55, 0.60 (3): tp sums to 12, pmf1 = 12 / 3 / 10.
    # Pairs: 1 found, 1 missed, 1 made up, 2 rightly empty.
    # mcc = (1 * 2 - 1 * 1) / sqrt((1 + 1) (1 + 1) (2 + 1) (2 + 1)) = 1 / 6.
    assert scores.summary() == pytest.approx({
        "cgf1": 0.4 / 6, "pmf1": 0.4, "il_mcc": 1 / 6, "f1_50": 2 / 3, "f1_75": 1 / 3, "precision_50": 2 / 3,
        "recall_50": 2 / 3, "positives": 2, "negatives": 3, "il_tp": 1, "il_fp": 1, "il_fn": 1, "il_tn": 2,
    })  # fmt: skip


def test_perfect_is_one() -> None:
    scores = ConceptScores().update(torch.eye(3)).update(NOTHING)
    assert {k: scores.summary()[k] for k in ("cgf1", "pmf1", "il_mcc", "precision_50", "recall_50")} == {
        "cgf1": 1.0, "pmf1": 1.0, "il_mcc": 1.0, "precision_50": 1.0, "recall_50": 1.0
    }  # fmt: skip


def test_false_positives_on_negative_pairs_reach_the_gate_alone() -> None:
    good = ConceptScores().update(torch.eye(2)).update(NOTHING)
    with_stray = good.update(torch.zeros(5, 0))
    assert with_stray.summary()["pmf1"] == 1.0
    assert with_stray.summary()["il_mcc"] < 1.0 and with_stray.summary()["cgf1"] == with_stray.summary()["il_mcc"]


def test_a_duplicate_is_a_false_positive() -> None:
    twice = ConceptScores().update(pair([0.96], [0.96]))
    assert twice.tp == (1,) * 10 and twice.fp == (1,) * 10 and twice.fn == (0,) * 10
    assert twice.summary()["f1_50"] == pytest.approx(2 / 3)  # 2 / (2 + 1 + 0)


@pytest.mark.parametrize("threshold", IOU_THRESHOLDS)
def test_an_iou_equal_to_a_threshold_counts(threshold: float) -> None:
    # n of 20 pixels, made of real masks: single precision puts some of these quotients below the threshold
    target = torch.ones(1, 1, 20, dtype=torch.bool)
    predicted = torch.arange(20).expand(1, 1, 20) < round(threshold * 20)
    at = IOU_THRESHOLDS.index(threshold)
    assert ConceptScores().update(mask_ious(predicted, target)).tp == (1,) * (at + 1) + (0,) * (9 - at)
    below = torch.tensor([[threshold - 1e-4]])
    assert ConceptScores().update(below).tp == (1,) * at + (0,) * (10 - at)


def test_the_assignment_maximises_the_sum_of_iou() -> None:
    # Taking the best pair first (0.9) would leave 0.0 for the other: one hit. The best sum, 0.8 + 0.7, gives two.
    scores = ConceptScores().update(pair([0.9, 0.8], [0.7, 0.0]))
    assert scores.tp[0] == 2
    rng = np.random.default_rng(0)
    for n, m in itertools.product(range(1, 5), repeat=2):
        iou = rng.random((n, m))
        wide = iou if n <= m else iou.T
        orders = [
            wide[range(len(wide)), list(columns)] for columns in itertools.permutations(range(max(n, m)), len(wide))
        ]
        best = max(orders, key=lambda values: values.sum())
        counts = ConceptScores().update(torch.from_numpy(iou))
        assert counts.tp == tuple(int((best >= t).sum()) for t in IOU_THRESHOLDS)
        assert [tp + fp for tp, fp in zip(counts.tp, counts.fp, strict=True)] == [n] * 10
        assert [tp + fn for tp, fn in zip(counts.tp, counts.fn, strict=True)] == [m] * 10


def test_mcc_is_the_correlation_of_two_binary_vectors() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        there, said = rng.integers(0, 3, 40), rng.integers(0, 3, 40)
        scores = ConceptScores()
        for n, m in zip(said, there, strict=True):
            scores = scores.update(torch.zeros(n, m))
        assert scores.summary()["il_mcc"] == pytest.approx(np.corrcoef(there > 0, said > 0)[0, 1])


def test_cgf1_is_negative_for_a_model_that_says_the_opposite() -> None:
    # found once, missed twice, made up twice: (1 * 0 - 2 * 2) / sqrt(3 * 2 * 3 * 2) = -4 / 6
    scores = ConceptScores().update(torch.eye(1)).update(torch.zeros(0, 1)).update(torch.zeros(0, 1))
    scores = scores.update(torch.zeros(1, 0)).update(torch.zeros(1, 0))
    # f1 = 2 / (2 + 0 + 2) at every threshold
    assert scores.summary()["cgf1"] == pytest.approx(-4 / 6 * 0.5)


@pytest.mark.parametrize("pairs", [
    [NOTHING, torch.zeros(1, 0)],  # all negative
    [torch.eye(1), torch.zeros(0, 1)],  # all positive
    [torch.zeros(0, 1), NOTHING],  # never a prediction
    [torch.eye(1), torch.zeros(1, 0)],  # always a prediction
])  # fmt: skip
def test_an_empty_margin_gives_no_correlation(pairs: list[torch.Tensor]) -> None:
    scores = ConceptScores()
    for iou in pairs:
        scores = scores.update(iou)
    summary = scores.summary()
    assert summary["il_mcc"] == summary["cgf1"] == 0.0
    assert summary["positives"] + summary["negatives"] == 2


def test_no_pair_gives_no_figure_and_no_positive_pair_zeros() -> None:
    assert ConceptScores().summary() == ConceptScores.merge([]).summary() == {}
    summary = ConceptScores().update(torch.zeros(3, 0)).summary()
    assert summary["pmf1"] == summary["f1_50"] == summary["precision_50"] == summary["recall_50"] == 0.0


def test_order_and_merge_change_nothing() -> None:
    rng = np.random.default_rng(2)
    ious = [torch.from_numpy(rng.random(tuple(rng.integers(0, 5, 2)))) for _ in range(30)]
    whole = ConceptScores()
    for iou in ious:
        whole = whole.update(iou)
    ranks = []
    for rank in range(4):
        scores = ConceptScores()
        for iou in reversed(ious[rank::4]):
            scores = scores.update(iou[torch.randperm(len(iou))])
        ranks.append(scores)
    assert ConceptScores.merge(ranks) == ConceptScores.merge(reversed(ranks)) == whole
    assert whole.summary()["positives"] == sum(iou.shape[1] > 0 for iou in ious)


def test_mask_ious_by_brute_force() -> None:
    g = torch.Generator().manual_seed(0)
    pred, target = torch.rand(3, 5, 6, generator=g) > 0.5, torch.rand(4, 5, 6, generator=g) > 0.3
    pred[0] = False
    target[0] = False
    expected = np.zeros((3, 4))
    for i, j in itertools.product(range(3), range(4)):
        first, second = ({tuple(at) for at in mask.nonzero().tolist()} for mask in (pred[i], target[j]))
        expected[i, j] = len(first & second) / max(1, len(first | second))
    assert np.allclose(mask_ious(pred, target).numpy(), expected) and expected[0].max() == 0
    assert mask_ious(pred[:0], target).shape == (0, 4) and mask_ious(pred, target[:0]).shape == (3, 0)
