"""Files of predictions against files of concepts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from samdistill.data.saco import (
    ConceptPair,
    ConceptSet,
    Prediction,
    load_predictions,
    to_rle,
    write_concepts,
    write_predictions,
)
from samdistill.evaluation.concept_files import mask_ap, rle_ious, score_predictions
from samdistill.metrics.concepts import ConceptScores, mask_ious
from samdistill.types import UserError

HEIGHT, WIDTH = 4, 20


def strip(start: int, end: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, start:end] = True
    return mask


def found(score: float, mask: np.ndarray) -> Prediction:
    return Prediction(score, to_rle(mask))


def truth_of(tmp_path: Path, *objects: list[np.ndarray]) -> ConceptSet:
    """One pair for each list of masks, with ids from 1, through a file."""
    pairs = [
        ConceptPair(number, "a.png", f"thing {number}", HEIGHT, WIDTH, tuple(to_rle(mask) for mask in masks))
        for number, masks in enumerate(objects, 1)
    ]
    write_concepts(tmp_path / "concepts.json", pairs)
    return ConceptSet.load(tmp_path / "concepts.json", check_images=False)


def test_perfect_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = [strip(0, 4), strip(6, 9)]
    truth = truth_of(tmp_path, masks, [])
    predictions = {1: [found(0.9, mask) for mask in masks]}
    assert score_predictions(truth, predictions).summary()["cgf1"] == 1.0
    assert mask_ap(truth, predictions) == pytest.approx({"ap": 1.0, "ap_50": 1.0, "ap_75": 1.0})
    assert capsys.readouterr() == ("", "")


def test_scores_below_the_threshold_count_for_precision_alone(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [strip(0, 4)], [], [])
    predictions = {1: [found(0.5, strip(0, 4)), found(0.4999, strip(9, 12))], 2: [found(0.3, strip(0, 4))]}
    assert score_predictions(truth, predictions).summary()["cgf1"] == 1.0
    low = score_predictions(truth, predictions, threshold=0.3)
    # one hit and one stray prediction on the positive pair; of the two negative pairs one has a prediction
    assert low == ConceptScores((1,) * 10, (1,) * 10, (0,) * 10, il_tp=1, il_fp=1, il_tn=1)
    high = score_predictions(truth, predictions, threshold=0.6)
    assert (high.il_tp, high.il_fn, high.il_tn, high.fn) == (0, 1, 2, (1,) * 10)


def test_precision_by_hand(tmp_path: Path) -> None:
    # Two objects in two pairs, a third pair without. By score: 0.9 wrong, 0.8 right, 0.7 right with IoU 0.6, 0.6 wrong.
    # IoU 0.50, 0.55, 0.60: precision at each hit is 1/2 and 2/3, made monotone 2/3 and 2/3: AP 2/3 over all recalls.
    # Above: one hit of two, precision 1/2 up to recall 0.5, which 51 of the 101 recalls reach: AP 51 / 202.
    truth = truth_of(tmp_path, [strip(0, 4)], [strip(10, 20)], [])
    predictions = {
        3: [found(0.9, strip(0, 4))],
        1: [found(0.8, strip(0, 4)), found(0.6, strip(0, 4))],
        2: [found(0.7, strip(10, 16))],
    }
    low, high = 2 / 3, 51 / 202
    expected = {"ap": (3 * low + 7 * high) / 10, "ap_50": low, "ap_75": high}
    assert mask_ap(truth, predictions) == pytest.approx(expected)


def test_precision_of_nothing(tmp_path: Path) -> None:
    assert mask_ap(truth_of(tmp_path, [strip(0, 4)], []), {}) == {"ap": 0.0, "ap_50": 0.0, "ap_75": 0.0}
    assert mask_ap(truth_of(tmp_path, [], []), {1: [found(0.9, strip(0, 4))]}) == {}
    assert mask_ap(truth_of(tmp_path, []), {}) == {}


def test_files_and_tensors_are_counted_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    objects, predictions, scores = [], {}, ConceptScores()
    for number in range(1, 25):
        m, n = (int(k) for k in rng.integers(0, 4, 2))
        masks = rng.random((m, HEIGHT, WIDTH)) > 0.5
        source = masks if m else rng.random((1, HEIGHT, WIDTH)) > 0.5
        drawn = np.stack([source[k % len(source)] ^ (rng.random((HEIGHT, WIDTH)) > 0.8) for k in range(3)])[:n]
        certainty = rng.random(n)
        objects.append(list(masks))
        predictions[number] = [found(float(s), mask) for s, mask in zip(certainty, drawn, strict=True)]
        kept = torch.from_numpy(drawn[certainty >= 0.5])
        scores = scores.update(mask_ious(kept, torch.from_numpy(masks)))
    truth = truth_of(tmp_path, *objects)
    write_predictions(tmp_path / "p.json", predictions)
    assert score_predictions(truth, load_predictions(tmp_path / "p.json")) == scores
    assert 0 < scores.summary()["pmf1"] < 1
    assert rle_ious([], truth.pairs[0].rles).shape == (0, len(objects[0]))


def test_predictions_of_another_file_are_refused(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [strip(0, 4)])
    for score in (score_predictions, mask_ap):
        with pytest.raises(UserError, match="not in the ground truth"):
            score(truth, {2: [found(0.9, strip(0, 4))]})
