from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from samdistill.metrics.features import FeatureScores, feature_cosine, feature_mse


def batch(seed: int, b: int = 4):
    g = torch.Generator().manual_seed(seed)
    predicted, target = (torch.randn(b, 6, 3, 5, generator=g) for _ in range(2))
    valid = torch.rand(b, 3, 5, generator=g) > 0.4
    valid[:, 0, 0] = True
    return predicted, target, valid


def test_equal_numpy_over_the_valid_cells() -> None:
    predicted, target, valid = batch(0)
    for i in range(4):
        p, t = (x[i].permute(1, 2, 0)[valid[i]].double().numpy() for x in (predicted, target))
        cosine = ((p * t).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(t, axis=1)).mean()
        assert feature_cosine(predicted, target, valid)[i].item() == pytest.approx(cosine, rel=1e-9)
        assert feature_mse(predicted, target, valid)[i].item() == pytest.approx(((p - t) ** 2).mean(), rel=1e-9)


def test_limits() -> None:
    x, _, valid = batch(1)
    torch.testing.assert_close(feature_cosine(x, 3 * x, valid), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(feature_cosine(x, -x, valid), -torch.ones(4, dtype=torch.float64))
    assert feature_mse(x, x, valid).eq(0).all()
    assert feature_mse(x, x + 2, valid) == pytest.approx([4.0] * 4, rel=1e-5)
    assert math.isnan(feature_mse(x, x, torch.zeros_like(valid))[0])


def test_merged_ranks_equal_one_process() -> None:
    whole = FeatureScores()
    ranks = [FeatureScores() for _ in range(3)]
    for i, size in enumerate((4, 2, 1, 3, 4)):
        data = batch(i, size)
        whole = whole.update(*data)
        ranks[i % 3] = ranks[i % 3].update(*data)
    merged = FeatureScores.merge(ranks)
    assert merged.images == whole.images == 14
    assert merged.summary() == pytest.approx(whole.summary())
    values = torch.cat([feature_cosine(*batch(i, size)) for i, size in enumerate((4, 2, 1, 3, 4))])
    assert merged.summary()["cosine"] == pytest.approx(values.mean().item())


def test_images_of_padding_alone_are_not_counted() -> None:
    predicted, target, valid = batch(0)
    valid[2] = False
    scores = FeatureScores().update(predicted, target, valid)
    keep = [0, 1, 3]
    assert scores.images == 3
    assert scores.summary() == pytest.approx(
        FeatureScores().update(predicted[keep], target[keep], valid[keep]).summary()
    )
    assert FeatureScores().summary() == {}
