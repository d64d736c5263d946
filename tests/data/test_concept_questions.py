"""Questions made from labels, against COCO's own reading of the same file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from samdistill.data.coco import CocoSource
from samdistill.data.concept_questions import concepts_of
from samdistill.data.folder import FolderSource
from samdistill.data.saco import ConceptSet, write_concepts

NAMES = ["car", "person", "dog", "cup"]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Image a: two cars and a person; b: a crowd of dogs and a car; c: nothing."""
    (tmp_path / "images").mkdir()
    images = [{"id": n, "file_name": f"{name}.png", "width": 40, "height": 30} for n, name in enumerate("abc", 1)]
    for image in images:
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "images" / image["file_name"])
    drawn = [(1, 1, 0), (1, 1, 0), (1, 2, 0), (2, 3, 1), (2, 1, 0)]
    annotations = [
        {"id": n, "image_id": image, "category_id": category, "iscrowd": crowd, "area": 1,
         "segmentation": [[n, n, n + 9, n, n + 9, n + 7, n, n + 7]]}
        for n, (image, category, crowd) in enumerate(drawn, 1)
    ]  # fmt: skip
    categories = [{"id": n, "name": name} for n, name in enumerate(NAMES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def test_names_of_an_image_are_asked_and_as_many_that_it_lacks(labelled: Path, capsys) -> None:
    found, coco = concepts_of(CocoSource(labelled, None)), COCO(str(labelled / "instances.json"))
    asked = {key: {p.text: p for p in found.pairs if p.file_name == key} for key in "ab"}
    there = {key: {text for text, pair in asked[key].items() if pair.rles} for key in asked}
    assert there == {"a": {"car", "person"}, "b": {"car"}}
    assert "dog" not in asked["b"] and set(asked["a"]) - there["a"] <= {"dog", "cup"}
    assert all(1 <= len(asked[key]) - len(there[key]) <= 2 for key in "ab")
    theirs = [coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(imgIds=[1], catIds=[1]))]
    assert (found.masks(asked["a"]["car"]) == np.stack(theirs).astype(bool)).all()
    assert [pair.id for pair in found.pairs] == list(range(1, len(found.pairs) + 1))
    assert found.pairs == concepts_of(CocoSource(labelled, None)).pairs
    assert len(concepts_of(CocoSource(labelled, None), images=1).by_image()) == 1


def test_it_is_what_a_file_of_concepts_says(labelled: Path) -> None:
    found = concepts_of(CocoSource(labelled, None))
    write_concepts(labelled / "concepts.json", found.pairs)
    read = ConceptSet.load(labelled / "concepts.json", check_images=False)
    assert [(p.id, p.text, coco_mask.area(list(p.rles)).tolist() if p.rles else []) for p in read.pairs] == [
        (p.id, p.text, coco_mask.area(list(p.rles)).tolist() if p.rles else []) for p in found.pairs
    ]


def test_images_without_labels_give_none(labelled: Path) -> None:
    assert concepts_of(FolderSource(labelled / "images")) is None
