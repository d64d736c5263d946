"""SA-Co's layout: pairs of image and phrase, and predictions for them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from samdistill.data.saco import ConceptPair, ConceptSet, find_concepts, to_rle, write_concepts
from samdistill.data.saco_predictions import (
    PredictedInstance,
    box_of,
    boxes_of,
    check_predictions,
    load_predictions,
    unused_predictions,
    write_predictions,
)
from samdistill.types import UserError

HEIGHT, WIDTH = 8, 10
SQUARE = [2, 1, 6, 1, 6, 5, 2, 5]  # columns 2..5, rows 1..4


def square() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[1:5, 2:6] = True
    return mask


def random_masks(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, HEIGHT, WIDTH)) > 0.6


def record() -> dict[str, Any]:
    """As published: two phrases on one image, one on another; boxes and areas as shares of the image."""
    size = {"height": HEIGHT, "width": WIDTH}
    square = {"area": 0.2, "bbox": [0.2, 0.125, 0.4, 0.5], "category_id": 1, "iscrowd": 0, "source": "manual"}
    return {
        "info": {"version": "v1"},
        "images": [
            {"id": 10000000, "file_name": "1/a.png", "text_input": "a fish", **size, "is_instance_exhaustive": 1},
            {"id": 10000001, "file_name": "1/a.png", "text_input": "a red fish", **size, "is_instance_exhaustive": 1},
            {"id": 10000002, "file_name": "b.png", "text_input": "a fish", **size, "is_instance_exhaustive": 1},
        ],
        "annotations": [
            {"id": 1, "image_id": 10000000, "segmentation": [SQUARE], **square},
            {"id": 2, "image_id": 10000000, "segmentation": {"size": [8, 10], "counts": [3, 2, 75]}, **square},
            {"id": 3, "image_id": 10000002, "segmentation": to_rle(random_masks(1)[0]), **square},
        ],
        "categories": [{"supercategory": "object", "id": 1, "name": "object"}],
        "licenses": [],
    }


def make(root: Path, content: Any, images: str | Path = "images", name: str = "concepts.json") -> Path:
    for file in ("1/a.png", "b.png"):
        path = root / images / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root / name


def test_pairs_masks_and_images(tmp_path: Path) -> None:
    truth = ConceptSet.load(make(tmp_path, record()))
    assert truth.problems == () and truth.ids == {10000000, 10000001, 10000002}
    fish, red, other = truth.pairs
    assert (fish.id, fish.text, fish.height, fish.width) == (10000000, "a fish", 8, 10)
    masks = truth.masks(fish)
    runs = np.zeros((8, 10), bool)
    runs[3:5, 0] = True  # run lengths go down the columns
    assert masks.dtype == bool and np.array_equal(masks, np.stack([square(), runs]))
    assert truth.masks(red).shape == (0, 8, 10) and np.array_equal(truth.masks(other), random_masks(1))
    assert truth.by_image() == {tmp_path / "images/1/a.png": [fish, red], tmp_path / "images/b.png": [other]}
    assert truth.path(other) == tmp_path / "images/b.png"


@pytest.mark.parametrize(("images", "name"), [
    (".", "concepts.json"), (".", "annotations/concepts.json"), ("images", "concepts.json"),
    ("images", "annotations/concepts.json"),
])  # fmt: skip
def test_where_images_are_found(tmp_path: Path, images: str, name: str) -> None:
    truth = ConceptSet.load(make(tmp_path, record(), images, name))
    assert len(truth.pairs) == 3 and truth.path(truth.pairs[0]).samefile(tmp_path / images / "1/a.png")


def test_images_elsewhere(tmp_path: Path) -> None:
    path = make(tmp_path / "set" / "deep", record(), tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no pair.*image is missing in"):
        ConceptSet.load(path)
    assert len(ConceptSet.load(path, check_images=False).pairs) == 3


def test_what_cannot_be_scored_is_left_out_and_listed(tmp_path: Path) -> None:
    content = record()
    group = {"image_id": 10000002, "iscrowd": 1, "segmentation": [SQUARE]}
    content["annotations"] += [group, {"image_id": 5, "segmentation": [SQUARE]}]
    extra = {"height": 8, "width": 10, "text_input": "a cat"}
    content["images"] += [
        {"id": 11, "file_name": "gone.png", **extra},
        {"id": 12, "file_name": "b.png", **extra},
        {"id": 13, "file_name": "b.png", **extra, "is_instance_exhaustive": 0},
    ]
    wrong = {"size": [9, 10], "counts": to_rle(np.ones((9, 10), bool))["counts"]}
    content["annotations"] += [{"image_id": 12, "segmentation": wrong}]
    truth = ConceptSet.load(make(tmp_path, content))
    assert [pair.id for pair in truth.pairs] == [10000000, 10000001, 10000002]
    assert len(truth.pairs[2].rles) == len(truth.pairs[2].groups) == 1  # the group beside it is no object
    assert {11, 12, 13} < truth.ids
    reasons = {problem.key: problem.reason for problem in truth.problems}
    assert reasons["annotations entry 4"] == "its image_id 5 is not listed"
    assert "missing" in reasons["gone.png 'a cat' (11)"]
    assert "[9, 10]" in reasons["b.png 'a cat' (12)"]
    assert reasons["b.png 'a cat' (13)"] == "not exhaustively annotated"
    assert len(reasons) == 4


def changed(place: str, number: int, name: str, value: Any) -> dict[str, Any]:
    content = record()
    content[place][number][name] = value
    return content


@pytest.mark.parametrize(("content", "said"), [
    ('{"images": [', "not a readable JSON file"),
    ([], "'images' is None"),
    ({"images": []}, "'annotations' is None"),
    ({"images": [], "annotations": []}, "no pair"),
    (changed("images", 1, "id", 10000000), "images entry 1: id 10000000 is taken"),
    (changed("images", 1, "text_input", None), "images entry 1: 'text_input' is None, not str"),
    (changed("images", 2, "text_input", "  "), "images entry 2: phrase '  '"),
    (changed("images", 0, "height", "8"), "'height' is '8', not int"),
    (changed("images", 0, "id", True), "'id' is True, not int"),
    (changed("annotations", 2, "image_id", None), "annotations entry 2: 'image_id' is None"),
    (changed("annotations", 2, "id", 1), "annotations entry 2: id 1 is taken"),
    (changed("annotations", 2, "category_id", "1"), "annotations entry 2: 'category_id' is '1', not int"),
    (changed("categories", 0, "id", None), "categories entry 0: 'id' is None"),
])  # fmt: skip
def test_foreign_and_torn_files(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        ConceptSet.load(make(tmp_path, content))
    assert said in str(caught.value) and "concepts.json" in str(caught.value)


def test_written_concepts_come_back_and_are_coco(tmp_path: Path) -> None:
    masks = random_masks(3)
    pairs = [
        ConceptPair(4, "1/a.png", "très grand poisson", HEIGHT, WIDTH, tuple(to_rle(mask) for mask in masks)),
        ConceptPair(2, "b.png", "a fish", HEIGHT, WIDTH, (), groups=(to_rle(masks[0]),)),
    ]
    path = make(tmp_path, record())
    write_concepts(path, pairs)
    truth = ConceptSet.load(path)
    assert [replace(pair, boxes=()) for pair in truth.pairs] == pairs and boxes_of(truth.pairs[0]) == boxes_of(pairs[0])
    assert np.array_equal(truth.masks(truth.pairs[0]), masks)
    assert not list(tmp_path.glob(".*"))
    coco = COCO(str(path))  # the reference reader sees the same masks, boxes and areas
    found = coco.loadAnns(coco.getAnnIds(imgIds=[4]))
    assert np.array_equal(np.stack([coco.annToMask(a) for a in found]), masks)
    assert [a["area"] for a in found] == masks.sum((1, 2)).tolist()
    rows, columns = np.nonzero(masks[1])
    x, y = columns.min(), rows.min()
    assert found[1]["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]


def test_written_predictions_come_back(tmp_path: Path) -> None:
    masks = [to_rle(mask) for mask in random_masks(3)]
    predictions = {
        7: [PredictedInstance(0.9, masks[0]), PredictedInstance(0.25, masks[1])],
        3: [PredictedInstance(1.0, masks[2])],
    }
    write_predictions(tmp_path / "p.json", predictions)
    loaded = load_predictions(tmp_path / "p.json")
    assert {k: [replace(p, box=None) for p in found] for k, found in loaded.items()} == predictions
    assert [box_of(p) for p in loaded[7]] == [box_of(p) for p in predictions[7]]
    first = json.loads((tmp_path / "p.json").read_text())[0]
    assert (first["image_id"], first["category_id"], first["score"]) == (7, 1, 0.9) and len(first["bbox"]) == 4
    write_predictions(tmp_path / "p.json", {})
    assert load_predictions(tmp_path / "p.json") == {}


def test_a_killed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.json"
    write_predictions(path, {1: [PredictedInstance(0.5, to_rle(square()))]})
    before = path.read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_predictions(path, {})
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="cannot be written"):
        write_predictions(tmp_path / "absent" / "p.json", {})


def entry(**changes: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "segmentation": to_rle(square()), "score": 0.5} | changes


@pytest.mark.parametrize(("content", "said"), [
    ("[{", "not a readable JSON file"),
    ({}, "holds dict"),
    ([entry(), 3], "entry 1: 'image_id' is None"),
    ([entry(image_id="1")], "entry 0: 'image_id' is '1', not int"),
    ([entry(), entry(score="high")], "entry 1: 'score' is 'high', not int or float"),
    ([entry(score=True)], "'score' is True"),
    ([entry(score=float("nan"))], "score is nan"),
    ([entry(segmentation=[SQUARE])], "'segmentation' is [[2, 1, 6, 1, 6, 5, ...]], not dict"),
    ([entry(segmentation={"counts": "x"})], "'size' is None, not list"),
    ([entry(segmentation={"size": [8], "counts": "x"})], "size is [8], not [height, width]"),
    ([entry(segmentation=to_rle(square()) | {"size": [9, 10]})], "entry 0: run lengths sum to 80, not to 9 x 10"),
    ([entry(segmentation={"size": [8, 10], "counts": "~~"})], "entry 0: run-length string is damaged"),
    ([entry(segmentation={"size": [8, 10], "counts": 4})], "entry 0: segmentation cannot be read"),
    ([entry(segmentation={"size": [8, 10]})], "entry 0: segmentation is neither polygons nor run lengths"),
])  # fmt: skip
def test_foreign_and_torn_predictions(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_predictions(path)
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_predictions_with_listed_runs_are_read(tmp_path: Path) -> None:
    listed = entry(segmentation={"size": [8, 10], "counts": [3, 2, 75]})
    (tmp_path / "p.json").write_text(json.dumps([listed]))
    mask = np.zeros((8, 10), bool)
    mask[3:5, 0] = True
    assert load_predictions(tmp_path / "p.json") == {1: [PredictedInstance(0.5, to_rle(mask))]}


def test_boxes_and_categories_are_read(tmp_path: Path) -> None:
    entries = [entry(bbox=[0.1, 0, 0.5, 1], category_id=3), entry(bbox=[1, 2, -3, 4]), entry(bbox="none")]
    entries.append({"image_id": 1, "score": 1, "bbox": [1, 2, 3, 4]})
    (tmp_path / "p.json").write_text(json.dumps(entries))
    read = load_predictions(tmp_path / "p.json")[1]
    assert [(p.category, p.box) for p in read] == [(3, (0.1, 0, 0.5, 1)), (1, None), (1, None), (1, (1, 2, 3, 4))]
    assert [p.rle is None for p in read] == [False, False, False, True]
    assert box_of(read[1]) == (2, 1, 4, 4) and box_of(read[3]) == (1, 2, 3, 4)  # tightly around the square


def test_predictions_of_another_ground_truth(tmp_path: Path) -> None:
    content = changed("images", 1, "is_instance_exhaustive", 0)
    truth = ConceptSet.load(make(tmp_path, content))
    fits = PredictedInstance(0.5, to_rle(square()))
    check_predictions(truth, {10000000: [fits], 10000001: [fits]})  # a pair that is not scored is known all the same
    assert unused_predictions(truth, {10000000: [fits], 10000001: [fits]}) == []
    with pytest.raises(UserError, match="no image_id is in the ground truth, not 7 either"):
        check_predictions(truth, {7: [fits]})
    (unused,) = unused_predictions(truth, {7: [fits], 10000000: [fits]})
    assert unused.reason == "1 ignored: image_ids that are not in the ground truth, such as 7"
    check_predictions(truth, {7: [fits], 10000000: [fits]})
    with pytest.raises(UserError, match=r"image_id 10000002 has a mask of \[10, 8\], its image is \[8, 10\]"):
        check_predictions(truth, {10000002: [PredictedInstance(0.5, to_rle(square().T))]})


def test_where_ground_truth_is_found(tmp_path: Path) -> None:
    assert find_concepts(tmp_path) is None and find_concepts(tmp_path / "absent.json") is None
    (tmp_path / "annotations").mkdir()
    (tmp_path / "instances.json").write_text("{}")
    expected = None
    for name in ("annotations/concepts.json", "annotations/concepts_val.json", "concepts.json", "concepts_val.json"):
        assert find_concepts(tmp_path) == expected
        expected = tmp_path / name
        expected.write_text("{}")
    assert find_concepts(tmp_path) == expected
    assert find_concepts(tmp_path / "instances.json") == tmp_path / "instances.json"
    (tmp_path / "a.png").write_text("")
    assert find_concepts(tmp_path / "a.png") is None
