"""How well a model finds what a phrase names: cgF1 and its factors, over (image, noun phrase) pairs.

Defined in Carion et al., SAM 3: Segment Anything with Concepts, 2025 (arXiv 2511.16719), section 5 "Metrics" and its
appendix. Details that the paper leaves open are those of facebookresearch/sam3 (``sam3/eval/cgf1_eval.py``): the small
terms in every denominator, the IoU thresholds, and which of several annotators counts. Written from the facts. The
paper multiplies by 100, here every share lies in 0..1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

SCORE_THRESHOLD = 0.5
"""Predictions with at least this score count, so that a model must be calibrated to be good."""
IOU_THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
"""COCO's, to the bit: some are the double next to the decimal number."""
MASK_TERM, PAIR_TERM = 1e-4, 1e-6
"""What the official evaluation adds to the denominators of shares of masks, and of shares of pairs."""
_NONE = (0,) * len(IOU_THRESHOLDS)


def mask_ious(pred: Bool[Tensor, "n h w"], target: Bool[Tensor, "m h w"]) -> Float[Tensor, "n m"]:
    """Intersection over union of every prediction with every target; 0 where both are empty, as in pycocotools.

    In double precision on the CPU, since an IoU of 0.7 in single precision is below 0.7.
    """
    flat = target.flatten(1)
    rows = []
    for mask in pred.flatten(1):  # one at a time: 200 queries by 50 objects of 1008 px would be 10 GB at once
        rows.append(torch.stack([(flat & mask).sum(-1), (flat | mask).sum(-1)]))
    if not rows:
        return torch.zeros(0, len(target), dtype=torch.float64)
    overlap, union = torch.stack(rows, 1).cpu().double()
    return overlap / union.clamp(min=1)


def _f1(precision: np.ndarray, recall: np.ndarray, term: float) -> np.ndarray:
    return 2 * precision * recall / (precision + recall + term)


def _f1_of_counts(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    return _f1(tp / (tp + fp + MASK_TERM), tp / (tp + fn + MASK_TERM), MASK_TERM)


@dataclass(frozen=True)
class ConceptScores:
    """Counts over all pairs seen so far; ``merge`` joins those of several ranks. Immutable: ``update`` gives a new one.

    tp, fp, fn: masks of the positive pairs (those with an object), at each of ``IOU_THRESHOLDS``. stray: predictions of
    the negative pairs. pair_f1: sum over positive pairs of each pair's own F1, at each threshold.
    il_tp, il_fp, il_fn, il_tn: pairs, "is anything predicted" against "is anything there".
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
        """With one pair added: the IoU of its ``n`` predictions above the score threshold with its ``m`` objects.

        n and m may be 0. Predictions and objects are assigned one to one so that the sum of IoU is greatest; the
        assignment is the same at every threshold.

        Several annotators give one matrix each, in the order of their files. The one with the best F1 counts (mean over
        ``IOU_THRESHOLDS``), the first of equals; where nothing is predicted, one who saw nothing is best.
        """
        best, *others = (_of_pair(iou) for iou in ious)
        for other in others:
            if other.il_tn or (not best.il_tn and np.mean(other.pair_f1) > np.mean(best.pair_f1)):
                best = other
        return self._plus(best)

    def _plus(self, other: ConceptScores) -> ConceptScores:
        sums = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            each = isinstance(mine, tuple)
            sums[field.name] = tuple(a + b for a, b in zip(mine, theirs, strict=True)) if each else mine + theirs
        return ConceptScores(**sums)

    @classmethod
    def merge(cls, parts: Iterable[ConceptScores]) -> ConceptScores:
        """One score of several, such as one per rank; order changes no figure, but ``pair_f1`` by rounding."""
        whole = cls()
        for part in parts:
            whole = whole._plus(part)
        return whole

    def summary(self) -> dict[str, float]:
        """Figures over all pairs; empty before any.

        - ``cgf1``: ``pmf1 * il_mcc``, classification-gated F1. Below 0 where ``il_mcc`` is.
        - ``pmf1``: positive micro F1, of the masks of all positive pairs together.
        - ``il_mcc``: image-level Matthews correlation, -1..1. It is 0 where a margin of the 2 x 2 table is empty (all
          pairs positive, or all negative, or always or never a prediction): nothing can correlate then.
        - ``precision``, ``recall``: of the masks of positive pairs, the factors of ``pmf1``.
        - ``pair_f1``: F1 of each positive pair with a prediction, mean over these; not there where no pair is one.
        - ``all_precision``, ``all_f1``: of the masks of all pairs, negative ones too.
        - ``il_precision``, ``il_recall``, ``il_f1``, ``il_fpr``: of pairs.
        - ``positives``, ``negatives``, ``il_tp``, ``il_fp``, ``il_fn``, ``il_tn``: numbers of pairs.

        Figures of masks are means over ``IOU_THRESHOLDS``; with ``_50`` or ``_75`` they are at that IoU alone, and
        ``pmf1`` is called ``f1_50`` and ``f1_75`` there. As in the official evaluation ``MASK_TERM`` or ``PAIR_TERM``
        is added to every denominator, so that a share of nothing is 0, and a perfect one a little below 1.
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
    """One pair alone, by one annotator."""
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
