"""Files of predictions against files of concepts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from detector_training import mask_ious
from samdistill.data.saco import ConceptPair, ConceptSet, to_rle, write_concepts
from samdistill.data.saco_predictions import PredictedInstance, load_predictions, unused_predictions, write_predictions
from samdistill.evaluation.concept_files import mask_ap, score_predictions, shape_ious
from samdistill.metrics.concepts import ConceptScores
from samdistill.types import UserError

HEIGHT, WIDTH = 4, 20


def strip(start: int, end: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, start:end] = True
    return mask


def found(score: float, mask: np.ndarray) -> PredictedInstance:
    return PredictedInstance(score, to_rle(mask))


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
    assert score_predictions(truth, predictions).summary()["cgf1"] == pytest.approx(1, abs=2e-4)
    assert mask_ap(truth, predictions) == pytest.approx({"ap": 1.0, "ap_50": 1.0, "ap_75": 1.0})
    assert capsys.readouterr() == ("", "")


def test_scores_below_the_threshold_count_for_precision_alone(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [strip(0, 4)], [], [])
    predictions = {1: [found(0.5, strip(0, 4)), found(0.4999, strip(9, 12))], 2: [found(0.3, strip(0, 4))]}
    assert score_predictions(truth, predictions).summary()["cgf1"] == pytest.approx(1, abs=2e-4)
    low = score_predictions(truth, predictions, threshold=0.3)
    # one hit and one stray prediction on the positive pair; of the two negative pairs one has a prediction
    counts = ConceptScores((1,) * 10, (1,) * 10, (0,) * 10, stray=1, il_tp=1, il_fp=1, il_tn=1)
    assert replace(low, pair_f1=counts.pair_f1) == counts
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
    assert shape_ious([], truth.pairs[0].rles).shape == (0, len(objects[0]))


def test_predictions_of_another_file_are_refused(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [strip(0, 4)])
    for score in (score_predictions, mask_ap):
        with pytest.raises(UserError, match="no image_id is in the ground truth"):
            score(truth, {2: [found(0.9, strip(0, 4))]})


def gold(
    folder: Path, name: str, *pairs: list[tuple[int, int, int, int]], categories: tuple[int, ...] = (1, 2)
) -> Path:
    """One annotator's file. pairs: of each (start, end, iscrowd, category_id) per annotation."""
    images = [{"id": number, "file_name": "a.png", "text_input": f"thing {number}", "height": HEIGHT, "width": WIDTH,
               "is_instance_exhaustive": 1} for number in range(1, len(pairs) + 1)]  # fmt: skip
    annotations = [
        {"image_id": number, "segmentation": to_rle(strip(start, end)), "iscrowd": crowd, "category_id": category,
         "bbox": [start / WIDTH, 0.0, (end - start) / WIDTH, 1.0]}
        for number, pair in enumerate(pairs, 1) for start, end, crowd, category in pair
    ]  # fmt: skip
    record = {"images": images, "annotations": [a | {"id": k} for k, a in enumerate(annotations)],
              "categories": [{"id": category, "name": "any"} for category in categories]}  # fmt: skip
    (folder / name).write_text(json.dumps(record))
    return folder / name


def test_a_pair_with_a_group_alone_is_a_negative_one(tmp_path: Path) -> None:
    truth = ConceptSet.load(gold(tmp_path, "a.json", [(0, 8, 1, 1)], [(0, 4, 0, 1), (8, 16, 1, 1)]), check_images=False)
    assert truth.problems == () and [len(pair.rles) for pair in truth.pairs] == [0, 1]
    silent = score_predictions(truth, {2: [found(0.9, strip(0, 4))]})
    assert (silent.il_tp, silent.il_tn, silent.tp[0], silent.fp[0]) == (1, 1, 1, 0)
    both = {number: [found(0.9, strip(0, 4)), found(0.8, strip(8, 16))] for number in (1, 2)}
    scores = score_predictions(truth, both)  # what lies in a group is made up
    assert (scores.il_tp, scores.il_fp, scores.stray, scores.tp[0], scores.fp[0]) == (1, 1, 2, 1, 1)
    # average precision, as COCO has it, takes it for neither right nor wrong: what is left is a hit and one false alarm
    assert mask_ap(truth, {2: both[2]}) == pytest.approx({"ap": 1, "ap_50": 1, "ap_75": 1})


def test_a_category_that_is_not_listed_does_not_exist(tmp_path: Path) -> None:
    path = gold(tmp_path, "a.json", [(0, 4, 0, 1), (10, 14, 0, 7)], [(0, 4, 0, 7)], categories=(1, 2))
    truth = ConceptSet.load(path, check_images=False)
    assert [len(pair.rles) for pair in truth.pairs] == [1, 0] and truth.categories == (frozenset({1, 2}),)
    assert [bad.reason for bad in truth.problems] == ["its category_id 7 is not listed, so it is ignored"] * 2
    predictions = {1: [found(0.9, strip(0, 4)), replace(found(0.9, strip(10, 14)), category=7)],
                   2: [replace(found(0.9, strip(0, 4)), category=9)]}  # fmt: skip
    scores = score_predictions(truth, predictions)
    assert (scores.tp[0], scores.fp[0], scores.fn[0], scores.il_tp, scores.il_tn) == (1, 0, 0, 1, 1)
    assert mask_ap(truth, predictions)["ap"] == pytest.approx(1)
    (unused,) = unused_predictions(truth, predictions)
    assert unused.reason == "2 ignored: a category_id that the ground truth does not list, such as 7"
    listed_twice = replace(found(0.9, strip(0, 4)), category=2)  # the category itself does not matter
    assert score_predictions(truth, {1: [listed_twice]}).tp[0] == 1


def test_of_several_annotators_the_best_counts_pair_by_pair(tmp_path: Path) -> None:
    a = gold(tmp_path, "a.json", [(0, 10, 0, 1)], [(0, 4, 0, 1)], [])
    b = gold(tmp_path, "b.json", [(0, 5, 0, 1)], [(0, 4, 0, 1), (8, 12, 0, 1)], [(0, 4, 0, 1)])
    truth = ConceptSet.load_annotators([a, b], check_images=False)
    assert [[len(p.rles) for p in (pair, *pair.others)] for pair in truth.pairs] == [[1, 1], [1, 2], [0, 1]]
    predictions = {1: [found(0.9, strip(0, 5))], 2: [found(0.9, strip(0, 4))]}
    scores = score_predictions(truth, predictions)
    # pair 1 as b has it (IoU 1 against 0.5), pair 2 as a has it (nothing missed), pair 3 as a has it (nothing there)
    assert scores.tp == (2,) * 10 and scores.fp == scores.fn == (0,) * 10 and (scores.il_tp, scores.il_tn) == (2, 1)
    alone = [
        score_predictions(ConceptSet.load(path, check_images=False), predictions).summary()["pmf1"] for path in (a, b)
    ]
    assert max(alone) < scores.summary()["pmf1"]
    both = score_predictions(truth, predictions | {3: [found(0.9, strip(0, 4))]})
    assert (both.il_tp, both.tp) == (3, (3,) * 10)


def test_annotators_have_to_be_of_the_same_pairs(tmp_path: Path) -> None:
    a, b = (gold(tmp_path, name, [(0, 4, 0, 1)], [(0, 4, 0, 1)]) for name in ("a.json", "b.json"))
    record = json.loads(b.read_text())
    record["images"][0]["is_instance_exhaustive"] = 0
    b.write_text(json.dumps(record))
    truth = ConceptSet.load_annotators([a, b], check_images=False)
    assert [pair.id for pair in truth.pairs] == [2]
    assert [(bad.key, bad.reason) for bad in truth.problems] == [
        ("b.json: a.png 'thing 1' (1)", "not exhaustively annotated")
    ]
    c = gold(tmp_path, "c.json", [(0, 4, 0, 1)])
    with pytest.raises(UserError, match=r"c.json: has no pair 2, 'thing 2'"):
        ConceptSet.load_annotators([a, c], check_images=False)
    record["images"][1]["text_input"] = "another"
    b.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"b.json: pair 2 is 'another', 20 x 4 pixels, in the first file 'thing 2'"):
        ConceptSet.load_annotators([a, b], check_images=False)


def test_boxes_are_compared_as_the_files_give_them(tmp_path: Path) -> None:
    truth = ConceptSet.load(gold(tmp_path, "a.json", [(0, 10, 0, 1)]), check_images=False)
    shares = {1: [PredictedInstance(0.9, None, box=(0.0, 0.0, 0.4, 1.0))]}  # IoU 0.8: hits at 0.50 .. 0.80
    assert score_predictions(truth, shares, iou="boxes").tp == (1,) * 7 + (0,) * 3
    with pytest.raises(UserError, match="a box and no segmentation; write masks, or compare boxes with --iou boxes"):
        score_predictions(truth, shares)
    with pytest.raises(UserError, match="ground truth are shares of the image, those of the predictions pixels"):
        score_predictions(truth, {1: [found(0.9, strip(0, 8))]}, iou="boxes")
    drawn = truth_of(tmp_path, [strip(0, 10)])  # in pixels; a prediction without a box has that of its mask
    assert score_predictions(drawn, {1: [found(0.9, strip(0, 8))]}, iou="boxes").tp == (1,) * 7 + (0,) * 3
    with pytest.raises(UserError, match="ground truth are pixels"):
        score_predictions(drawn, shares, iou="boxes")
