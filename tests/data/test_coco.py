"""COCO instances."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from samdistill.config import DataConfig
from samdistill.data import BadImage, CocoSource, Source, open_source
from samdistill.data.coco import decode_segmentation
from samdistill.types import UserError

REAL = Path(__file__).parents[3] / "shared" / "data" / "coco"


def record() -> dict:
    square = [2, 1, 6, 1, 6, 5, 2, 5]  # columns 2..5, rows 1..4
    return {
        "images": [{"id": i, "file_name": f"{n}.png", "height": 8, "width": 10} for i, n in enumerate("abc")],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 7, "segmentation": [square], "iscrowd": 0},
            {"id": 2, "image_id": 0, "category_id": 9, "iscrowd": 1,
             "segmentation": {"size": [8, 10], "counts": [3, 2, 75]}},
            {"id": 3, "image_id": 1, "category_id": 9, "segmentation": [square], "iscrowd": 0},
        ],
    }  # fmt: skip


def make(root: Path, content: dict, annotations: str = "instances.json", images: str = "images") -> Path:
    (root / images).mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        Image.new("RGB", (10, 8)).save(root / images / image["file_name"])
    (root / annotations).parent.mkdir(parents=True, exist_ok=True)
    (root / annotations).write_text(json.dumps(content))
    return root


def test_polygons_crowds_categories(tmp_path: Path) -> None:
    source = CocoSource(make(tmp_path, record()), None)
    assert source.keys == ["a", "b", "c"] and source.problems == [] and source.labelled
    cat, crowd = source.instances("a")
    expected = np.zeros((8, 10), bool)
    expected[1:5, 2:6] = True
    assert np.array_equal(cat.mask, expected) and (cat.category, cat.id, cat.crowd) == ("cat", 1, False)
    expected = np.zeros((8, 10), bool)
    expected[3:5, 0] = True  # run lengths go down the columns
    assert np.array_equal(crowd.mask, expected) and (crowd.category, crowd.id, crowd.crowd) == ("dog", 2, True)
    assert source.instances("c") == []
    assert source.load("a").size == (10, 8)


@pytest.mark.parametrize("images", ["train2017", "images/train2017", "images"])
def test_official_layouts(tmp_path: Path, images: str) -> None:
    make(tmp_path, record(), "annotations/instances_train2017.json", images)
    assert CocoSource.splits(tmp_path) == ["train", "train2017"]
    data = DataConfig(kind="coco", root=tmp_path)
    assert open_source(data, "train").keys == ["a", "b", "c"]
    with pytest.raises(UserError, match="no split 'val'"):
        open_source(data, "held_out")


def test_two_years_need_the_full_name(tmp_path: Path) -> None:
    for year in (2014, 2017):
        make(tmp_path, record(), f"annotations/instances_train{year}.json", f"train{year}")
    assert CocoSource.splits(tmp_path) == ["train2014", "train2017"]


def test_missing_images_and_strangers_are_listed(tmp_path: Path) -> None:
    content = record()
    content["annotations"].append({"id": 4, "image_id": 1, "category_id": 5, "segmentation": [[1, 1, 2, 2, 1, 2]]})
    content["annotations"].append({"id": 5, "image_id": 1, "category_id": 7, "segmentation": []})
    make(tmp_path, content)
    (tmp_path / "images/a.png").unlink()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/stranger.png")
    source = CocoSource(tmp_path, None)
    assert source.keys == ["b", "c"]
    assert dict(source.problems) == {
        "a": "listed in the JSON, but its image is missing",
        "stranger": "image without an entry in the JSON",
        "annotation 1": "its image 0 is missing",
        "annotation 2": "its image 0 is missing",
        "b, annotation 4": "unknown category 5",
        "b, annotation 5": "has no segmentation",
    }
    assert [i.id for i in source.instances("b")] == [3]


def test_images_in_subfolders_and_repeated_entries(tmp_path: Path) -> None:
    content = record()
    (tmp_path / "images/sub").mkdir(parents=True)
    content["images"][0]["file_name"] = "sub/a.png"
    content["images"].append({"id": 8, "file_name": "b.png", "height": 8, "width": 10})
    source = CocoSource(make(tmp_path, content), None)
    assert source.keys == ["b", "c", "sub/a"] and len(source.instances("sub/a")) == 2
    assert source.problems == [("b", "listed twice in the JSON; id 8 is left out")]


@pytest.mark.parametrize(
    "segmentation", [None, [], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [7], {"size": [8, 10], "counts": [80, -1, 1]},
                     {"size": [8, 10], "counts": [3, 2]}, {"size": [10, 8], "counts": [80]}, {"size": [8, 10]}]
)  # fmt: skip
def test_an_unusable_outline_costs_its_object_alone(tmp_path: Path, segmentation: object) -> None:
    content = record()
    content["annotations"].append({**content["annotations"][0], "id": 4, "segmentation": segmentation})
    if segmentation is None:
        del content["annotations"][-1]["segmentation"]
    source = CocoSource(make(tmp_path, content), None)
    assert [problem.key for problem in source.problems] == ["a, annotation 4"]
    assert [instance.id for instance in source.instances("a")] == [1, 2]
    assert [instance.id for instance in source.instances("b")] == [3]


@pytest.mark.parametrize(
    ("place", "inside"),
    [({"segmentation": [[2, 1, 12, 1, 12, 5, 2, 5]]}, True), ({"segmentation": [[2, 1, 13, 1, 13, 5, 2, 5]]}, False),
     ({"segmentation": [[2, -3, 6, 1, 6, 5]]}, False), ({"segmentation": [[20, 1, 26, 1, 26, 5]]}, False),
     ({"segmentation": [[2, 1, float("nan"), 1, 6, 5]]}, False),
     ({"bbox": [2, 1, 4, 4]}, True), ({"bbox": [2, 1, 9.5, 4]}, True), ({"bbox": [2, 1, 20, 4]}, False),
     ({"bbox": [40, 1, 4, 4]}, False), ({"bbox": [2, 1, -1, 4]}, False), ({"bbox": [2, 1, 4]}, False),
     ({"bbox": ["x", 1, 4, 4]}, False), ({"bbox": [float("nan"), 1, 4, 4]}, False)],
)  # fmt: skip
def test_what_lies_outside_its_image_costs_the_object(tmp_path: Path, place: dict, inside: bool) -> None:
    content = record()
    content["annotations"].append({**content["annotations"][0], "id": 4, **place})
    source = CocoSource(make(tmp_path, content), None)
    assert [problem.key for problem in source.problems] == ([] if inside else ["a, annotation 4"])
    assert [instance.id for instance in source.instances("a")] == [1, 2, 4][: 3 if inside else 2]
    boxes = source.boxes("a")
    assert len(boxes) == (2 if inside else 1) and boxes.min() >= 0 and (boxes[:, 2:] <= (10, 8)).all()


def test_ids_may_be_texts(tmp_path: Path) -> None:
    content = record()
    for image in content["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in content["annotations"]:
        annotation |= {"id": f"object {annotation['id']}", "image_id": f"image {annotation['image_id']}"}
    source = CocoSource(make(tmp_path, content), None)
    assert source.problems == []
    assert [[i.id for i in source.instances(key)] for key in "abc"] == [["object 1", "object 2"], ["object 3"], []]


@pytest.mark.parametrize("field", ["image_id", "category_id"])
def test_numbers_and_texts_are_not_mixed(tmp_path: Path, field: str) -> None:
    content = record()
    content["annotations"][0][field] = str(content["annotations"][0][field])
    with pytest.raises(UserError, match=rf"{field} '\d' is not listed, but \d is; write both as numbers or both"):
        CocoSource(make(tmp_path, content), None)


def test_one_id_for_two_images_or_categories_is_refused(tmp_path: Path) -> None:
    """Else every object would be on both."""
    content = record()
    content["images"][1]["id"] = 0
    with pytest.raises(UserError, match=r"image id 0 is used for 'a\.png' and 'b\.png'; give each its own"):
        CocoSource(make(tmp_path, content), None)
    content = record()
    content["categories"][1]["id"] = 7
    with pytest.raises(UserError, match="category id 7 is used for 'cat' and 'dog'"):
        CocoSource(make(tmp_path, content), None)
    content = record()
    content["images"].append(dict(content["images"][0]))  # the very same entry says nothing new
    assert CocoSource(make(tmp_path, content), None).problems == []


def test_an_entry_of_another_size_than_its_file_is_refused(tmp_path: Path) -> None:
    content = record()
    content["images"][0] |= {"height": 10, "width": 8}
    content["annotations"] = content["annotations"][2:]
    content["images"][2] |= {"height": 80, "width": 100}
    source = CocoSource(make(tmp_path, content), None)
    for key, words in (("a", "8 x 10 pixels, its image 10 x 8: with its sides swapped it fits"),
                       ("c", "100 x 80 pixels, its image 10 x 8: give the image that was annotated")):  # fmt: skip
        for ask in (source.load, source.instances, source.boxes, source.check):
            with pytest.raises(BadImage, match=rf"{key}: its entry in instances\.json is {words}"):
                ask(key)
    assert source.check("b") == (8, 10) and source.load("b").size == (10, 8)


def test_run_lengths_as_floats() -> None:
    assert decode_segmentation({"size": [2, 3], "counts": [1.0, 2.0, 3.0]}, 2, 3).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"images": []}'])
def test_what_is_no_instances_file_is_a_user_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(UserError, match="not a COCO instances file"):
        CocoSource(tmp_path, None)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real COCO sample at {REAL}")
def test_real_masks_equal_pycocotools_own_reader() -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(REAL / "instances.json"))
    source = CocoSource(REAL, None)
    assert len(source.keys) == 68 and source.problems == []
    ids = {Path(image["file_name"]).stem: image["id"] for image in reference.imgs.values()}
    names, crowds = {c["id"]: c["name"] for c in reference.cats.values()}, 0
    for key in source.keys:
        expected = reference.imgToAnns[ids[key]]
        for instance, a in zip(source.instances(key), expected, strict=True):
            assert (instance.id, instance.category) == (a["id"], names[a["category_id"]])
            assert np.array_equal(instance.mask, reference.annToMask(a))
            crowds += instance.crowd
    assert crowds == 14


def test_boxes_come_from_bbox_without_masks(tmp_path: Path) -> None:
    content = record()
    for annotation in content["annotations"]:
        annotation |= {"bbox": [1, 0, 3, 4]}  # not around its outline
    source = CocoSource(make(tmp_path, content), None)
    assert source.boxes("a").tolist() == [[1, 0, 4, 4]]  # the second one is a crowd
    assert source.boxes("c").shape == (0, 4)
    del content["annotations"][2]["bbox"]
    assert CocoSource(make(tmp_path, content), None).boxes("b").tolist() == [[2, 1, 6, 5]]


def test_phrases_are_categories_or_concepts(tmp_path: Path) -> None:
    content = record()
    content["annotations"].append({**content["annotations"][0], "id": 4})
    content["categories"].append({"id": 3, "name": "aardvark"})
    source = CocoSource(make(tmp_path, content), None)
    assert [source.phrases(key) for key in "abc"] == [["cat", "dog"], ["dog"], []]
    assert source.vocabulary == ["aardvark", "cat", "dog"]
    content["annotations"][2]["concepts"] = ["wolf", "dog"]
    content["annotations"][3]["concepts"] = ["kitten", "cat"]
    source = CocoSource(make(tmp_path, content), None)
    assert [source.phrases(key) for key in "abc"] == [["cat", "dog", "kitten"], ["wolf", "dog"], []]
    assert source.vocabulary == ["cat", "dog", "kitten", "wolf"]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real COCO sample at {REAL}")
def test_real_boxes_hold_their_masks() -> None:
    """Outlines lie between pixels, and a thin tip fills none; a wrong convention would move an edge by 1 on average."""
    source = CocoSource(REAL, None)
    off = np.concatenate([source.boxes(key) - Source.read_boxes(source, key) for key in source.keys])
    assert len(off) > 900 and np.abs(off.mean(0)).max() < 0.3 and np.abs(off).max() < 4
    assert len(source.vocabulary) == 80


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../secret.png", "a/../../secret.png", "..\\secret.png", "a\0.png", "", "C:/a.png"]
)
def test_a_file_name_that_leads_out_of_the_folder_is_a_problem_and_no_key(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (10, 8)).save(tmp_path / "secret.png")
    (tmp_path / "set" / "images").mkdir(parents=True)
    Image.new("RGB", (10, 8)).save(tmp_path / "set" / "images" / "b.png")
    content = record()
    content["images"][0]["file_name"] = name
    (tmp_path / "set" / "instances.json").write_text(json.dumps(content))
    source = CocoSource(tmp_path / "set", None)
    assert source.keys == ["b"]
    assert any("its name" in problem.reason for problem in source.problems)


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, 3, "x", {}, [3], [None], [{}], [[]], [{"id": [], "file_name": {}, "name": 1}]])
def test_whatever_a_part_of_the_file_is_the_error_names_it(part: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (10, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "instances.json").write_text(json.dumps({**record(), part: value}))
    if part == "annotations" and isinstance(value, list) and value and isinstance(value[0], dict):
        assert [p.key for p in CocoSource(tmp_path, None).problems if p.key.startswith("annotation")]
        return
    with pytest.raises(UserError, match=r"instances\.json: not a COCO instances file: [^\n]+$"):
        CocoSource(tmp_path, None)


@pytest.mark.parametrize("size", [[float("inf"), 10], ["8", 10], 3, None, [8], [[8], 10], {}])
def test_a_mask_whose_size_is_none_is_no_mask(size: object) -> None:
    with pytest.raises(ValueError, match="mask of size"):
        decode_segmentation({"size": size, "counts": [80]}, 8, 10)
