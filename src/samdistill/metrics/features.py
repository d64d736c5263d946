"""Similarity of a student's and a teacher's embedding over the cells that lie on the image, not on padding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def feature_cosine(
    predicted: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], valid: Bool[Tensor, "b h w"]
) -> Float[Tensor, " b"]:
    """Cosine similarity over channels, averaged over the valid cells of each image.

    Args:
        predicted: Embedding of the student.
        target: Embedding of the teacher.
        valid: True for cells on the image.

    Returns:
        float64 values in -1..1. NaN for an image without a valid cell.
    """
    cosine = F.cosine_similarity(predicted.double(), target.double(), dim=1)
    return _mean_of_valid(cosine, valid)


def feature_mse(
    predicted: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], valid: Bool[Tensor, "b h w"]
) -> Float[Tensor, " b"]:
    """Mean squared error over channels and the valid cells of each image.

    Args:
        predicted: Embedding of the student.
        target: Embedding of the teacher.
        valid: True for cells on the image.

    Returns:
        float64 values. NaN for an image without a valid cell.
    """
    return _mean_of_valid(((predicted.double() - target.double()) ** 2).mean(1), valid)


def _mean_of_valid(cells: Float[Tensor, "b h w"], valid: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    return torch.where(valid, cells, 0.0).sum((1, 2)) / valid.sum((1, 2))


@dataclass(frozen=True)
class FeatureScores:
    """Running means of cosine similarity and squared error over images. The object is immutable.

    It holds sums, so the scores of several ranks add up exactly.
    """

    images: int = 0
    cosine_sum: float = 0.0
    mse_sum: float = 0.0

    def update(self, predicted: Tensor, target: Tensor, valid: Tensor) -> FeatureScores:
        """Return the scores with a batch added. Images without a valid cell are not counted.

        Shapes are those of ``feature_cosine``.
        """
        some = valid.flatten(1).any(1)
        return replace(
            self,
            images=self.images + int(some.sum()),
            cosine_sum=self.cosine_sum + float(feature_cosine(predicted, target, valid)[some].sum()),
            mse_sum=self.mse_sum + float(feature_mse(predicted, target, valid)[some].sum()),
        )

    @classmethod
    def merge(cls, parts: Iterable[FeatureScores]) -> FeatureScores:
        """Add up several scores, such as one per rank."""
        parts = list(parts)
        return cls(sum(p.images for p in parts), sum(p.cosine_sum for p in parts), sum(p.mse_sum for p in parts))

    def summary(self) -> dict[str, float]:
        """Return ``cosine`` and ``mse``, each a mean over images. The result is empty if there are no images."""
        if not self.images:
            return {}
        return {"cosine": self.cosine_sum / self.images, "mse": self.mse_sum / self.images}
