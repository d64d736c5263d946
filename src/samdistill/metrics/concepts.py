"""Concept segmentation metrics over (image, noun phrase) pairs: cgF1 and its factors.

Details that the paper leaves open follow facebookresearch/sam3 (``sam3/eval/cgf1_eval.py``): the terms added to every
denominator, the IoU thresholds, and the choice between several annotators. This is an independent implementation. The
paper multiplies by 100; here every share lies in 0..1.

Source:
    Carion et al., SAM 3: Segment Anything with Concepts, 2025 (arXiv 2511.16719), section 5 "Metrics" and appendix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

SCORE_THRESHOLD = 0.5
"""Only predictions with at least this score count, so a good result needs calibrated scores."""
IOU_THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
"""COCO's thresholds, 0.5 to 0.95 in steps of 0.05. They are bitwise equal to COCO's: some are the double next to the
decimal number.
"""
MASK_TERM, PAIR_TERM = 1e-4, 1e-6
"""Terms that the official evaluation adds to the denominators of mask figures and of pair figures."""
_NONE = (0,) * len(IOU_THRESHOLDS)


def _f1(precision: np.ndarray, recall: np.ndarray, term: float) -> np.ndarray:
    return 2 * precision * recall / (precision + recall + term)


def _f1_of_counts(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    return _f1(tp / (tp + fp + MASK_TERM), tp / (tp + fn + MASK_TERM), MASK_TERM)


@dataclass(frozen=True)
class ConceptScores:
    """Counts over all pairs so far. The object is immutable: ``update`` and ``merge`` return new ones.

    A positive pair is one whose phrase has at least one object in the image.

    Attributes:
        tp, fp, fn: Masks of the positive pairs, at each of ``IOU_THRESHOLDS``.
        stray: Predictions of the negative pairs.
        pair_f1: Sum over positive pairs of the pair's own F1, at each threshold.
        il_tp, il_fp, il_fn, il_tn: Image-level counts of pairs: whether anything is predicted, against whether there is
            an object.

    Example:
        >>> ConceptScores().update(mask_ious(pred, target)).summary()["cgf1"]
    """

    tp: tuple[int, ...] = _NONE
    fp: tuple[int, ...] = _NONE
    fn: tuple[int, ...] = _NONE
    stray: int = 0
    pair_f1: tuple[float, ...] = (0.0,) * len(IOU_THRESHOLDS)
    il_tp: int = 0
    il_fp: int = 0
    il_fn: int = 0
    il_tn: int = 0

    def update(self, *ious: Float[Tensor, "n m"]) -> ConceptScores:
        """Return the scores with one pair added.

        Predictions and objects are assigned one to one so that the sum of IoU is largest. The assignment is the same at
        every threshold.

        Args:
            ious: IoU of the pair's n predictions above the score threshold with its m objects, one matrix per annotator
                in the order of their files. n and m may be 0. Of several annotators the one with the best F1 counts
                (mean over ``IOU_THRESHOLDS``), the first one if equal. If nothing is predicted, an annotator without
                objects is the best.
        """
        best, *others = (_of_pair(iou) for iou in ious)
        for other in others:
            if other.il_tn or (not best.il_tn and np.mean(other.pair_f1) > np.mean(best.pair_f1)):
                best = other
        return self._plus(best)

    def without(self, part: ConceptScores) -> ConceptScores:
        """Return the scores without those of ``part``, which must be included. ``pair_f1`` is equal up to rounding."""
        return self._plus(part, -1)

    def _plus(self, other: ConceptScores, sign: int = 1) -> ConceptScores:
        sums = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            each = isinstance(mine, tuple)
            sums[field.name] = (
                tuple(a + sign * b for a, b in zip(mine, theirs, strict=True)) if each else mine + sign * theirs
            )
        return ConceptScores(**sums)

    @classmethod
    def merge(cls, parts: Iterable[ConceptScores]) -> ConceptScores:
        """Add up several scores, such as one per rank.

        The order changes no figure except ``pair_f1``, by rounding.
        """
        whole = cls()
        for part in parts:
            whole = whole._plus(part)
        return whole

    def summary(self) -> dict[str, float]:
        """Return the figures over all pairs. The result is empty if there are no pairs.

        - ``cgf1``: ``pmf1 * il_mcc``, classification-gated F1. It is negative where ``il_mcc`` is.
        - ``pmf1``: positive micro F1, over the masks of all positive pairs together.
        - ``il_mcc``: image-level Matthews correlation coefficient, -1..1. It is 0 if a margin of the 2 x 2 table is
          empty (all pairs positive, all negative, always or never a prediction), where no correlation is defined.
        - ``precision``, ``recall``: of the masks of positive pairs, the factors of ``pmf1``.
        - ``pair_f1``: F1 per positive pair, mean over the positive pairs with a prediction. It is missing if there are
          none.
        - ``all_precision``, ``all_f1``: of the masks of all pairs, including negative ones.
        - ``il_precision``, ``il_recall``, ``il_f1``, ``il_fpr``: of pairs.
        - ``positives``, ``negatives``, ``il_tp``, ``il_fp``, ``il_fn``, ``il_tn``: numbers of pairs.

        Mask figures are means over ``IOU_THRESHOLDS``. With the suffix ``_50`` or ``_75`` they are at that IoU alone,
        where ``pmf1`` is called ``f1_50`` and ``f1_75``. As in the official evaluation, ``MASK_TERM`` or ``PAIR_TERM``
        is added to every denominator. A share of nothing is therefore 0, and a perfect share is slightly below 1.
        """
        positives, negatives = self.il_tp + self.il_fn, self.il_fp + self.il_tn
        if not positives + negatives:
            return {}
        tp, fp, fn = (np.array(counts, np.float64) for counts in (self.tp, self.fp, self.fn))
        f1, recall, il_mcc = _f1_of_counts(tp, fp, fn), tp / (tp + fn + MASK_TERM), self._il_mcc()
        precision = tp / (tp + fp + self.stray + MASK_TERM)
        at_each = {
            "cgf1": f1 * il_mcc, "f1": f1, "precision": tp / (tp + fp + MASK_TERM), "recall": recall,
            "all_precision": precision, "all_f1": _f1(precision, recall, MASK_TERM),
        }  # fmt: skip
        if self.il_tp:
            at_each["pair_f1"] = np.array(self.pair_f1) / self.il_tp
        figures = {"pmf1" if name == "f1" else name: float(values.mean()) for name, values in at_each.items()}
        for name, values in at_each.items():
            figures |= {f"{name}_50": float(values[0]), f"{name}_75": float(values[IOU_THRESHOLDS.index(0.75)])}
        return figures | {"il_mcc": il_mcc} | self._pairs(positives, negatives)

    def _il_mcc(self) -> float:
        yes, no = self.il_tp + self.il_fp, self.il_fn + self.il_tn
        margins = float(yes) * float(self.il_tp + self.il_fn) * float(self.il_tn + self.il_fp) * float(no)
        return (self.il_tp * self.il_tn - self.il_fp * self.il_fn) / (margins**0.5 + PAIR_TERM)

    def _pairs(self, positives: int, negatives: int) -> dict[str, float]:
        recall = self.il_tp / (positives + PAIR_TERM)
        precision = self.il_tp / (self.il_tp + self.il_fp + PAIR_TERM)
        counts = {"positives": positives, "negatives": negatives, "il_tp": self.il_tp, "il_fp": self.il_fp,
                  "il_fn": self.il_fn, "il_tn": self.il_tn}  # fmt: skip
        return {
            "il_precision": precision, "il_recall": recall,
            "il_f1": 2 * precision * recall / (precision + recall + PAIR_TERM),
            "il_fpr": self.il_fp / (negatives + PAIR_TERM),
        } | {name: float(count) for name, count in counts.items()}  # fmt: skip


def _of_pair(iou: Float[Tensor, "n m"]) -> ConceptScores:
    """Return the scores of one pair by one annotator."""
    predicted, objects = iou.shape
    if not objects:
        return ConceptScores(stray=predicted, il_fp=int(predicted > 0), il_tn=int(predicted == 0))
    values = iou.detach().cpu().double().numpy()
    matched = values[linear_sum_assignment(values, maximize=True)]
    tp = np.array([np.count_nonzero(matched >= threshold) for threshold in IOU_THRESHOLDS])
    fp, fn = predicted - tp, objects - tp
    own = _f1_of_counts(tp, fp, fn)
    counts = (tuple(each.tolist()) for each in (tp, fp, fn))
    return ConceptScores(*counts, pair_f1=tuple(own.tolist()), il_tp=int(predicted > 0), il_fn=int(predicted == 0))
