"""Factors of scores: the best one against a search of another library, and what a model answers with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from transformers import Sam3Model

from samdistill.inference.concepts import load_concept_model
from samdistill.students.scores import KEY, ScoreFactors, best_factor, scale_scores
from samdistill.types import ConceptPrompts, ImageBatch


@pytest.mark.parametrize(("scale", "noise"), [(0.3, 1.0), (1.0, 2.0), (4.0, 0.5)])
def test_the_factor_has_the_lowest_cross_entropy(scale: float, noise: float) -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=400)
    logits, yes = scale * (truth + noise * rng.normal(size=400)), truth > 0.3

    def cross_entropy(factor: float) -> float:
        return float(np.logaddexp(0, np.where(yes, -1, 1) * factor * logits).mean())

    wanted = minimize_scalar(cross_entropy, bounds=(0.125, 8), method="bounded", options={"xatol": 1e-9}).x
    assert 0.13 < wanted < 7.9
    found = best_factor(torch.from_numpy(logits.reshape(20, 20)).float(), torch.from_numpy(yes.reshape(20, 20)))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_the_factor_stays_between_its_limits() -> None:
    logits = torch.tensor([2.0, 1.0, -1.0])
    assert best_factor(logits, logits > 0) == pytest.approx(8)
    assert best_factor(logits, logits < 0) == pytest.approx(0.125)


def test_a_model_answers_with_its_factors_and_a_file_keeps_them(detector, tmp_path: Path) -> None:
    _, folder = detector
    loaded = load_concept_model(folder)
    images = torch.randint(256, (2, 3, 126, 126), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    asked = ImageBatch.full(images), ConceptPrompts.words(["red circle", "star", "star"], [0, 0, 1])
    before = loaded.answer(*asked)
    scale_scores(loaded.model, ScoreFactors(3.0, 0.25))
    scale_scores(loaded.model, ScoreFactors(0.5, 2.0))
    after = loaded.answer(*asked)
    torch.testing.assert_close(after.pred_logits, 1.5 * before.pred_logits)
    torch.testing.assert_close(after.presence_logits, 0.5 * before.presence_logits)
    assert before.pred_logits.abs().max() > 1e-3 and before.presence_logits.abs().max() > 1e-3
    for name in ("pred_masks", "pred_boxes", "semantic_seg", "encoder"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    loaded.model.save_pretrained(tmp_path)
    plain = Sam3Model.from_pretrained(tmp_path)
    assert getattr(plain.config, KEY) == {"query": 1.5, "presence": 0.5}
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in loaded.model.state_dict().items())
