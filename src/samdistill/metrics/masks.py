"""How good masks are: intersection over union with ground truth, or with another model's masks (agreement)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from ..ops.masks import mask_iou

THRESHOLDS = (0.5, 0.75)


@dataclass(frozen=True)
class MaskScores:
    """IoU of every mask seen so far; ``merge`` joins those of several ranks. Immutable: ``update`` gives a new one.

    ``ious`` keeps every value (4 bytes each), so that any share or quantile of the whole is exact after a merge.
    """

    ious: tuple[float, ...] = ()

    def update(
        self, predicted: Bool[Tensor, "*n h w"], target: Bool[Tensor, "*n h w"], valid: Bool[Tensor, "*n"] | None = None
    ) -> MaskScores:
        """With the valid pairs of a batch added. ``target`` is ground truth, or the other model's masks."""
        ious = mask_iou(predicted, target)
        kept = ious.flatten() if valid is None else ious[valid]
        return MaskScores(self.ious + tuple(kept.tolist()))

    @classmethod
    def merge(cls, parts: Iterable[MaskScores]) -> MaskScores:
        """One score of several, such as one per rank; order does not change a figure."""
        return cls(tuple(iou for part in parts for iou in part.ious))

    def summary(self) -> dict[str, float]:
        """``miou``, ``iou_50`` and ``iou_75`` (shares of masks with at least that IoU), ``masks``; empty before any."""
        if not self.ious:
            return {}
        values = torch.tensor(self.ious, dtype=torch.float64)
        shares = {f"iou_{round(100 * t)}": float((values >= t - 1e-6).double().mean()) for t in THRESHOLDS}
        return {"miou": float(values.mean()), **shares, "masks": float(len(values))}


def agreement(first: Bool[Tensor, "*n h w"], second: Bool[Tensor, "*n h w"]) -> dict[str, float]:
    """The summary of one set of masks against another, symmetric: two empty masks agree fully."""
    return MaskScores().update(first, second).summary()
