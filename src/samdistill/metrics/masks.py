"""Mask quality: intersection over union with ground truth, or with another model's masks (agreement)."""

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
    """IoU of every mask so far. The object is immutable: ``update`` and ``merge`` return new ones.

    Attributes:
        ious: All values, so that every share and quantile is exact after a merge.
    """

    ious: tuple[float, ...] = ()

    def update(
        self, predicted: Bool[Tensor, "*n h w"], target: Bool[Tensor, "*n h w"], valid: Bool[Tensor, "*n"] | None = None
    ) -> MaskScores:
        """Return the scores with a batch added.

        Args:
            predicted: Predicted masks.
            target: Ground truth, or the masks of another model.
            valid: True for the pairs that count. None counts all.
        """
        ious = mask_iou(predicted, target)
        kept = ious.flatten() if valid is None else ious[valid]
        return MaskScores(self.ious + tuple(kept.tolist()))

    @classmethod
    def merge(cls, parts: Iterable[MaskScores]) -> MaskScores:
        """Join several scores, such as one per rank. The order changes no figure."""
        return cls(tuple(iou for part in parts for iou in part.ious))

    def summary(self) -> dict[str, float]:
        """Return the figures over all masks. The result is empty if there are no masks.

        ``miou`` is the mean IoU. ``iou_50`` and ``iou_75`` are the shares of masks with at least that IoU. ``masks`` is
        the number of masks.
        """
        if not self.ious:
            return {}
        values = torch.tensor(self.ious, dtype=torch.float64)
        shares = {f"iou_{round(100 * t)}": float((values >= t - 1e-6).double().mean()) for t in THRESHOLDS}
        return {"miou": float(values.mean()), **shares, "masks": float(len(values))}


def agreement(first: Bool[Tensor, "*n h w"], second: Bool[Tensor, "*n h w"]) -> dict[str, float]:
    """Return the summary of one set of masks against another.

    It is symmetric. Two empty masks have an IoU of 1.
    """
    return MaskScores().update(first, second).summary()
