"""cgF1 and its factors."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from detector_training import mask_ious
from samdistill.metrics.concepts import IOU_THRESHOLDS, ConceptScores


def pair(*rows: list[float], objects: int | None = None) -> torch.Tensor:
    """IoU of predictions (rows) with objects (columns)."""
    return torch.tensor(rows).reshape(len(rows), objects if objects is not None else len(rows[0]))


NOTHING = torch.zeros(0, 0)


def official_f1(tp: int, fp: int, fn: int) -> float:
    """As facebookresearch/sam3 has it: 1e-4 in every denominator."""
    precision, recall = tp / (tp + fp + 1e-4), tp / (tp + fn + 1e-4)
    return 2 * precision * recall / (precision + recall + 1e-4)


def test_figures_by_hand() -> None:
    scores = ConceptScores()
    scores = scores.update(pair([0.92, 0.0], [0.0, 0.61], [0.3, 0.2]))  # two objects, two hits, one stray prediction
    scores = scores.update(torch.zeros(0, 1))  # an object, nothing predicted
    scores = scores.update(torch.zeros(2, 0))  # no object, two predictions
    scores = scores.update(NOTHING)  # no object, nothing predicted
    scores = scores.update(NOTHING)
    # The positive pairs hold 3 objects and 3 predictions. 0.92 counts at 0.50 .. 0.90 (9 thresholds), 0.61 at 0.50,
    # 0.55, 0.60 (3): two hits at 3 thresholds, one at 6, none at 1.
    two, one = official_f1(2, 1, 1), official_f1(1, 2, 2)
    assert (two, one) == pytest.approx((0.66660, 0.33327), abs=1e-5)  # by hand: 2/3 and 1/3, less 1e-4 of each
    # Pairs: 1 found, 1 missed, 1 made up, 2 rightly empty.
    # mcc = (1 * 2 - 1 * 1) / (sqrt((1 + 1) (1 + 1) (2 + 1) (2 + 1)) + 1e-6) = 1 / 6.000001.
    mcc, pmf1 = 1 / 6.000001, (3 * two + 6 * one) / 10
    found = scores.summary()
    expected = {
        "cgf1": pmf1 * mcc, "pmf1": pmf1, "il_mcc": mcc, "f1_50": two, "f1_75": one, "cgf1_75": one * mcc,
        "precision_50": 2 / 3.0001, "precision_75": 1 / 3.0001, "recall_50": 2 / 3.0001, "recall": 1.2 / 3.0001,
        # the negative pairs' predictions too, 5 in all
        "all_precision_50": 2 / 5.0001, "all_f1_50": official_f1(2, 3, 1),
        # the one positive pair that was answered: 3 predictions, 2 objects
        "pair_f1_50": official_f1(2, 1, 0), "pair_f1_75": official_f1(1, 2, 1),
        "positives": 2, "negatives": 3, "il_tp": 1, "il_fp": 1, "il_fn": 1, "il_tn": 2,
        "il_precision": 1 / 2.000001, "il_recall": 1 / 2.000001, "il_fpr": 1 / 3.000001,
        "il_f1": 2 * 0.25 / (1 + 1e-6),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_perfect_is_one_but_for_the_small_terms() -> None:
    scores = ConceptScores().update(torch.eye(3)).update(NOTHING)
    found = scores.summary()
    assert (found["pmf1"], found["f1_50"]) == pytest.approx([official_f1(3, 0, 0)] * 2) and 0.9999 < found[
        "pmf1"
    ] < 0.99995
    assert found["il_mcc"] == 1 / (1 + 1e-6) and found["cgf1"] == pytest.approx(found["pmf1"] * found["il_mcc"])
    assert found["precision_50"] == found["recall_50"] == 3 / 3.0001


def test_of_several_annotators_the_best_counts() -> None:
    """Pair by pair, by the mean F1 over the thresholds."""
    good, poor = pair([0.96]), pair([0.6])
    assert ConceptScores().update(poor, good) == ConceptScores().update(good, poor) == ConceptScores().update(good)
    # one object found against the same and another one missed: F1 of 1 against 2/3
    assert ConceptScores().update(pair([0.96, 0.0]), good) == ConceptScores().update(good)
    # nothing predicted: an annotator who marked nothing is right, else the first one's objects are missed
    empty, one, two = NOTHING, torch.zeros(0, 1), torch.zeros(0, 2)
    for order in ((one, empty), (empty, one), (two, empty, one)):
        assert ConceptScores().update(*order) == ConceptScores(il_tn=1)
    assert ConceptScores().update(two, one).fn == (2,) * 10 and ConceptScores().update(one, two).fn == (1,) * 10
    # predicted: F1 is 0 with an annotator who saw nothing, and the first of equals stays
    absent, missed = torch.zeros(1, 0), pair([0.2])
    assert ConceptScores().update(absent, good) == ConceptScores().update(good)
    assert ConceptScores().update(absent, missed) == ConceptScores(stray=1, il_fp=1)
    assert ConceptScores().update(missed, absent).il_tp == 1


def test_false_positives_on_negative_pairs_reach_the_gate_alone() -> None:
    good = ConceptScores().update(torch.eye(2)).update(NOTHING)
    with_stray = good.update(torch.zeros(5, 0))
    before, after = good.summary(), with_stray.summary()
    assert after["pmf1"] == before["pmf1"] == pytest.approx(1, abs=1e-3) and after["all_f1"] < 0.5 < before["all_f1"]
    assert after["il_mcc"] < 1.0 and after["cgf1"] == pytest.approx(after["il_mcc"] * after["pmf1"])


def test_a_duplicate_is_a_false_positive() -> None:
    twice = ConceptScores().update(pair([0.96], [0.96]))
    assert twice.tp == (1,) * 10 and twice.fp == (1,) * 10 and twice.fn == (0,) * 10
    assert twice.summary()["f1_50"] == pytest.approx(2 / 3, abs=1e-4)  # 2 / (2 + 1 + 0)


@pytest.mark.parametrize("threshold", IOU_THRESHOLDS)
def test_an_iou_equal_to_a_threshold_counts(threshold: float) -> None:
    # n of 20 pixels, made of real masks: single precision would put some of these quotients below the threshold
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
        assert scores.summary()["il_mcc"] == pytest.approx(np.corrcoef(there > 0, said > 0)[0, 1], abs=1e-6)


def test_cgf1_is_negative_for_a_model_that_says_the_opposite() -> None:
    # found once, missed twice, made up twice: (1 * 0 - 2 * 2) / sqrt(3 * 2 * 3 * 2) = -4 / 6
    scores = ConceptScores().update(torch.eye(1)).update(torch.zeros(0, 1)).update(torch.zeros(0, 1))
    scores = scores.update(torch.zeros(1, 0)).update(torch.zeros(1, 0))
    # f1 = 2 / (2 + 0 + 2) at every threshold
    assert scores.summary()["cgf1"] == pytest.approx(-4 / 6.000001 * official_f1(1, 0, 2))
    assert official_f1(1, 0, 2) == pytest.approx(0.5, abs=1e-4)


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
    assert "pair_f1" not in summary and summary["il_fpr"] == 1 / (1 + 1e-6)


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
    for merged in (ConceptScores.merge(ranks), ConceptScores.merge(reversed(ranks))):
        assert replace(merged, pair_f1=whole.pair_f1) == whole and merged.summary() == pytest.approx(whole.summary())
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
