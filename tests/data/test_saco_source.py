"""SA-Co files as training data."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samdistill.config import DataConfig, QuestionsConfig
from samdistill.data import Geometry, PhraseBook, QuestionDataset, SacoSource, ViewTransform, open_source
from samdistill.data.labels import require_labels
from samdistill.types import UserError

SIZE = {"height": 8, "width": 10}
SQUARE, BAR = [2, 1, 6, 1, 6, 5, 2, 5], [0, 6, 9, 6, 9, 8, 0, 8]


def record() -> dict[str, Any]:
    """a.png: fish (two), red fish (one), shark (none), shoal (a group). sub/b.png: shark. c.png: not exhaustive."""
    asked = [("1/a.png", "a  fish", 1), ("1/a.png", "red fish", 1), ("1/a.png", "shark", 1), ("1/a.png", "shoal", 1),
             ("b.png", "shark", 1), ("c.png", "whale", 0)]  # fmt: skip
    drawn = [(0, SQUARE, 0), (0, BAR, 0), (1, BAR, 0), (3, SQUARE, 1), (4, SQUARE, 0), (5, BAR, 0)]
    return {
        "images": [
            {"id": n, "file_name": name, "text_input": text, **SIZE, "is_instance_exhaustive": whole}
            for n, (name, text, whole) in enumerate(asked)
        ],
        "annotations": [
            {"id": n, "image_id": pair, "category_id": 1, "iscrowd": crowd, "segmentation": [outline]}
            for n, (pair, outline, crowd) in enumerate(drawn)
        ],
        "categories": [{"id": 1, "name": "object"}],
    }


def made(root: Path, content: dict[str, Any], name: str = "concepts.json") -> Path:
    for image in content["images"]:
        (root / image["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 8)).save(root / image["file_name"])
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(json.dumps(content))
    return root


def test_phrases_objects_and_verified_negatives(tmp_path: Path) -> None:
    source = SacoSource(made(tmp_path, record()), None)
    assert source.keys == ["1/a", "b"] and source.labelled
    assert [bad.reason for bad in source.problems] == ["not exhaustively annotated"]
    assert source.phrases("1/a") == ["a fish", "red fish"] and source.absent("1/a") == ["shark"]
    assert source.phrases("b") == ["shark"] and source.absent("b") == []
    assert source.vocabulary == ["a fish", "red fish", "shark", "shoal"]
    told = {name: source.complete("1/a", name) for name in ("a fish", "red fish", "shark", "shoal", "whale")}
    assert told == {"a fish": True, "red fish": True, "shark": True, "shoal": False, "whale": False}
    found = [(one.names, one.crowd, int(one.mask.sum())) for one in source.instances("1/a")]
    assert found == [(("a fish",), False, 16), (("a fish",), False, 18), (("red fish",), False, 18),
                     (("shoal",), True, 16)]  # fmt: skip
    assert source.boxes("1/a").tolist() == [[2, 1, 6, 5], [0, 6, 9, 8], [0, 6, 9, 8]]
    require_labels(source, "label_mask")
    assert pickle.loads(pickle.dumps(source)).keys == source.keys  # loader workers


def test_negatives_are_the_verified_ones(tmp_path: Path) -> None:
    book = PhraseBook(
        QuestionsConfig(source="names", negatives=0.5, per_image=40), SacoSource(made(tmp_path, record()), None)
    )
    first, second = (QuestionDataset(book, ViewTransform(Geometry(20)), label_side=5)[n][1] for n in (0, 1))
    told = {q.text: (len(q.labels.boxes), q.labels.present, q.labels.complete) for q in first if q.labels is not None}
    assert told == {"a fish": (2, True, True), "red fish": (1, True, True), "shark": (0, False, True)}
    # no negative of b.png is known: others are asked, and nothing is said about them
    unknown = {q.text for q in second if q.labels is None}
    assert unknown == {"a fish", "red fish", "shoal"} and {q.text for q in second} == {*unknown, "shark"}


@pytest.mark.parametrize("folder", ["", "annotations/"])
def test_splits_are_files(tmp_path: Path, folder: str) -> None:
    for split in ("train", "val"):
        made(tmp_path, record(), f"{folder}concepts_{split}.json")
    assert SacoSource.splits(tmp_path) == ["train", "val"]
    data = DataConfig(kind="saco", root=tmp_path)
    assert open_source(data, "train").keys == open_source(data, "held_out").keys == ["1/a", "b"]


def test_masks_and_images_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither concepts\.json nor concepts_<split>\.json"):
        SacoSource(tmp_path, None)
    content = record()
    content["images"].append({"id": 9, "file_name": "b.jpg", "text_input": "shark", **SIZE})
    source = SacoSource(made(tmp_path, content), None)
    assert ("b.jpg", "has the same stem as b.png") in source.problems
    digests = {key: source.label_digest(key) for key in source.keys}
    content["annotations"][4]["segmentation"] = [BAR]
    changed = SacoSource(made(tmp_path, content), None)
    assert [changed.label_digest(key) == digests[key] for key in changed.keys] == [True, False]
    Image.fromarray(np.zeros((6, 7, 3), np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"its entry in concepts\.json is 10 x 8 pixels, its image 7 x 6"):
        source.load("b")
