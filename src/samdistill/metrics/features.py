"""How close a student's embedding is to the teacher's, over the cells that lie on the image."""

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
    """Cosine over channels, averaged over each image's valid cells, in -1..1. NaN for an image without any."""
    cosine = F.cosine_similarity(predicted.double(), target.double(), dim=1)
    return _mean_of_valid(cosine, valid)


def feature_mse(
    predicted: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], valid: Bool[Tensor, "b h w"]
) -> Float[Tensor, " b"]:
    """Squared error per element (mean over channels and each image's valid cells). NaN for an image without any."""
    return _mean_of_valid(((predicted.double() - target.double()) ** 2).mean(1), valid)


def _mean_of_valid(cells: Float[Tensor, "b h w"], valid: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    return torch.where(valid, cells, 0.0).sum((1, 2)) / valid.sum((1, 2))


@dataclass(frozen=True)
class FeatureScores:
    """Running mean over images of both figures. Sums, so scores of several ranks add up to the exact whole."""

    images: int = 0
    cosine_sum: float = 0.0
    mse_sum: float = 0.0

    def update(self, predicted: Tensor, target: Tensor, valid: Tensor) -> FeatureScores:
        """With a batch added; an image without a valid cell is not counted. Shapes as in ``feature_cosine``."""
        some = valid.flatten(1).any(1)
        return replace(
            self,
            images=self.images + int(some.sum()),
            cosine_sum=self.cosine_sum + float(feature_cosine(predicted, target, valid)[some].sum()),
            mse_sum=self.mse_sum + float(feature_mse(predicted, target, valid)[some].sum()),
        )

    @classmethod
    def merge(cls, parts: Iterable[FeatureScores]) -> FeatureScores:
        """One score of several, such as one per rank."""
        parts = list(parts)
        return cls(sum(p.images for p in parts), sum(p.cosine_sum for p in parts), sum(p.mse_sum for p in parts))

    def summary(self) -> dict[str, float]:
        """``cosine`` and ``mse``, each a mean over images; empty before the first."""
        if not self.images:
            return {}
        return {"cosine": self.cosine_sum / self.images, "mse": self.mse_sum / self.images}
