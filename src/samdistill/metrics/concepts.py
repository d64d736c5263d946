"""How well a model finds what a phrase names: cgF1 and its factors, over (image, noun phrase) pairs.

Defined in Carion et al., SAM 3: Segment Anything with Concepts, 2025 (arXiv 2511.16719), section 5 "Metrics" and its
appendix; written from that definition. The paper multiplies by 100, here every share lies in 0..1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

SCORE_THRESHOLD = 0.5
"""Predictions with at least this score count, so that a model must be calibrated to be good."""
IOU_THRESHOLDS: tuple[float, ...] = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
_NONE = (0,) * len(IOU_THRESHOLDS)


def mask_ious(pred: Bool[Tensor, "n h w"], target: Bool[Tensor, "m h w"]) -> Float[Tensor, "n m"]:
    """Intersection over union of every prediction with every target; 0 where both are empty, as in pycocotools."""
    flat = target.flatten(1)
    rows = []
    for mask in pred.flatten(1):  # one at a time: 200 queries by 50 objects of 1008 px would be 10 GB at once
        overlap, union = (flat & mask).sum(-1), (flat | mask).sum(-1)
        rows.append(overlap / union.clamp(min=1))
    return torch.stack(rows) if rows else torch.zeros(0, len(target), device=target.device)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True)
class ConceptScores:
    """Counts over all pairs seen so far; ``merge`` joins those of several ranks. Immutable: ``update`` gives a new one.

    tp, fp, fn: masks of the positive pairs (those with an object), at each of ``IOU_THRESHOLDS``.
    il_tp, il_fp, il_fn, il_tn: pairs, "is anything predicted" against "is anything there".
    """

    tp: tuple[int, ...] = _NONE
    fp: tuple[int, ...] = _NONE
    fn: tuple[int, ...] = _NONE
    il_tp: int = 0
    il_fp: int = 0
    il_fn: int = 0
    il_tn: int = 0

    def update(self, iou: Float[Tensor, "n m"]) -> ConceptScores:
        """With one pair added: the IoU of its ``n`` predictions above the score threshold with its ``m`` objects.

        n and m may be 0. Predictions and objects are assigned one to one so that the sum of IoU is greatest; the
        assignment is the same at every threshold.
        """
        predicted, objects = iou.shape
        if not objects:
            return self._plus(ConceptScores(il_fp=int(predicted > 0), il_tn=int(predicted == 0)))
        values = iou.detach().double().cpu().numpy()
        matched = values[linear_sum_assignment(values, maximize=True)]
        # the tolerance of ``MaskScores``: 0.7 in single precision is below 0.7
        tp = tuple(int((matched >= threshold - 1e-6).sum()) for threshold in IOU_THRESHOLDS)
        fp, fn = (tuple(count - hits for hits in tp) for count in (predicted, objects))
        return self._plus(ConceptScores(tp, fp, fn, il_tp=int(predicted > 0), il_fn=int(predicted == 0)))

    def _plus(self, other: ConceptScores) -> ConceptScores:
        sums = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            each = isinstance(mine, tuple)
            sums[field.name] = tuple(a + b for a, b in zip(mine, theirs, strict=True)) if each else mine + theirs
        return ConceptScores(**sums)

    @classmethod
    def merge(cls, parts: Iterable[ConceptScores]) -> ConceptScores:
        """One score of several, such as one per rank; order does not change a figure."""
        whole = cls()
        for part in parts:
            whole = whole._plus(part)
        return whole

    def summary(self) -> dict[str, float]:
        """Figures over all pairs; empty before any.

        - ``cgf1``: ``pmf1 * il_mcc``, classification-gated F1. Below 0 where ``il_mcc`` is.
        - ``pmf1``: positive micro F1, ``2 tp / (2 tp + fp + fn)`` over positive pairs, mean over ``IOU_THRESHOLDS``.
        - ``il_mcc``: image-level Matthews correlation, -1..1. It is 0 where a margin of the 2 x 2 table is empty (all
          pairs positive, or all negative, or always or never a prediction): nothing can correlate then.
        - ``f1_50``, ``f1_75``, ``precision_50``, ``recall_50``: over positive pairs. A share of nothing is 0.
        - ``positives``, ``negatives``, ``il_tp``, ``il_fp``, ``il_fn``, ``il_tn``: numbers of pairs.
        """
        positives, negatives = self.il_tp + self.il_fn, self.il_fp + self.il_tn
        if not positives + negatives:
            return {}
        counts = zip(self.tp, self.fp, self.fn, strict=True)
        f1 = [_share(2 * tp, 2 * tp + fp + fn) for tp, fp, fn in counts]
        yes, no = self.il_tp + self.il_fp, self.il_fn + self.il_tn
        covariance = self.il_tp * self.il_tn - self.il_fp * self.il_fn
        il_mcc = _share(covariance, (positives * negatives * yes * no) ** 0.5)
        pmf1 = sum(f1) / len(f1)
        figures = {
            "cgf1": pmf1 * il_mcc, "pmf1": pmf1, "il_mcc": il_mcc,
            "f1_50": f1[0], "f1_75": f1[IOU_THRESHOLDS.index(0.75)],
            "precision_50": _share(self.tp[0], self.tp[0] + self.fp[0]),
            "recall_50": _share(self.tp[0], self.tp[0] + self.fn[0]),
        }  # fmt: skip
        pairs = {"positives": positives, "negatives": negatives, "il_tp": self.il_tp, "il_fp": self.il_fp,
                 "il_fn": self.il_fn, "il_tn": self.il_tn}  # fmt: skip
        return figures | {name: float(count) for name, count in pairs.items()}
