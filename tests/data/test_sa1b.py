"""SA-1B trees and flat folders, and the facts of the real files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from samdistill.config import DataConfig
from samdistill.data import BadImage, Sa1bSource, open_source
from samdistill.data.coco import run_lengths
from samdistill.sandbox.write import write_sa1b
from samdistill.types import UserError

REAL = Path(__file__).parents[3] / "shared" / "data" / "sa1b"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real SA-1B sample at {REAL}")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sa1b")
    write_sa1b(root, 4, 48, seed=1)
    write_sa1b(root, 2, 48, seed=2, split="val")
    return root


@pytest.fixture
def tree(rendered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered, tmp_path / "tree"))


def flat(tree: Path, target: Path) -> Path:
    target.mkdir()
    for path in sorted(tree.glob("*/train/sa_*")):
        shutil.copy(path, target)
    return target


def config(root: Path, **changes: object) -> DataConfig:
    return DataConfig.model_validate({"kind": "sa1b", "root": root, **changes})


def test_tree_has_its_own_splits(tree: Path) -> None:
    assert Sa1bSource.splits(tree) == ["train", "val"]
    assert open_source(config(tree), "train").keys == [f"sa_100000{i}" for i in range(4)]
    assert open_source(config(tree), "held_out").keys == ["sa_2000000", "sa_2000001"]
    assert open_source(config(tree, held_out="train", split="val"), "held_out").keys[0] == "sa_1000000"


def test_flat_folder_and_unset_held_out_are_divided_by_key(tree: Path, tmp_path: Path) -> None:
    for data in (config(flat(tree, tmp_path / "flat")), config(tree, held_out=None)):
        train, held_out = open_source(data, "train").keys, open_source(data, "held_out").keys
        assert train and held_out and sorted(train + held_out) == [f"sa_100000{i}" for i in range(4)]


def test_a_wrong_split_gets_a_suggestion(tree: Path) -> None:
    with pytest.raises(UserError, match="no split 'trian'; did you mean 'train'"):
        open_source(config(tree, split="trian"), "train")
    with pytest.raises(UserError, match="also the training split"):
        open_source(config(tree, held_out="train"), "train")


def test_unpaired_files_are_listed_not_lost(tree: Path) -> None:
    (tree / "images/train/sa_1000001.jpg").unlink()
    (tree / "annotations/train/sa_1000002.json").unlink()
    source = open_source(config(tree), "train")
    assert source.keys == ["sa_1000000", "sa_1000003"]
    assert source.problems == [("sa_1000002", "image without its JSON"), ("sa_1000001", "JSON without its image")]
    for path in tree.glob("annotations/train/*"):
        path.unlink()
    with pytest.raises(UserError, match=r"no image .*; 3 inputs were unusable, first sa_1000000: image without its"):
        open_source(config(tree), "train")


def edit(tree: Path, change: object) -> Sa1bSource:
    path = tree / "annotations/train/sa_1000000.json"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        record = json.loads(path.read_text())
        change(record)  # type: ignore[operator]
        path.write_text(json.dumps(record))
    return Sa1bSource(tree, "train")


@pytest.mark.parametrize("change", [
    b"", b"{", b"[]", b"{}",
    lambda r: r["annotations"][0].pop("segmentation"),
    lambda r: r["annotations"][0]["segmentation"].update(size=[3, 3]),
    lambda r: r["annotations"][0]["segmentation"].update(counts=r["annotations"][0]["segmentation"]["counts"][:-4]),
    lambda r: r["annotations"][0]["segmentation"].update(counts=""),
    lambda r: r["annotations"][0]["segmentation"].update(counts="\x7f\x7f"),
    lambda r: r["annotations"][0]["segmentation"].update(counts=[1, 2, 3]),
    lambda r: r["annotations"][0]["segmentation"].update(counts=5),
])  # fmt: skip
def test_broken_annotation_raises_bad_image(tree: Path, change: object) -> None:
    source = edit(tree, change)
    with pytest.raises(BadImage, match="sa_1000000"):
        source.instances("sa_1000000")
    assert source.instances("sa_1000001")


@pytest.mark.parametrize(
    ("size", "words"),
    [((12, 20), "its image 12 x 20: with its sides swapped it fits"), ((10, 6), "give the image that")],
)
def test_an_annotation_of_another_size_is_refused_whoever_asks(tmp_path: Path, size, words: str) -> None:
    """A photograph that was turned after it was annotated, and one that was scaled down."""
    outline = {"id": 1, "bbox": [0, 0, 3, 3], "segmentation": {"size": [12, 20], "counts": [0, 240]}}
    (tmp_path / "sa_1.json").write_text(json.dumps({"image": {"height": 12, "width": 20}, "annotations": [outline]}))
    Image.new("RGB", size).save(tmp_path / "sa_1.jpg")
    source = Sa1bSource(tmp_path, None)
    for ask in (source.load, source.instances, source.boxes, source.check):
        with pytest.raises(BadImage, match=rf"sa_1: sa_1\.json is 20 x 12 pixels, .*{words}"):
            ask("sa_1")
    Image.new("RGB", (20, 12)).save(tmp_path / "sa_1.jpg")
    assert source.instances("sa_1")[0].mask.all() and source.load("sa_1")


def test_a_phones_photograph_is_taken_upright(tree: Path) -> None:
    """Lying in its file with an orientation, and annotated as it is shown: nothing is wrong with it."""
    path = tree / "images/train/sa_1000000.jpg"
    upright, exif = Image.open(path), Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    source = Sa1bSource(tree, "train")
    assert source.load("sa_1000000").size == upright.size and source.instances("sa_1000000")


def test_images_that_are_no_jpeg_are_read_or_named(tree: Path) -> None:
    folder = tree / "images/train"
    Image.open(folder / "sa_1000000.jpg").save(folder / "sa_1000000.png")
    (folder / "sa_1000000.jpg").unlink()
    (folder / "sa_1000001.jpg").rename(folder / "sa_1000001.cr2")
    source = Sa1bSource(tree, "train")
    assert source.path("sa_1000000").suffix == ".png" and source.instances("sa_1000000")
    assert [bad.key for bad in source.problems] == ["sa_1000001.cr2", "sa_1000001"]


@needs_real
def test_real_files_masks_equal_areas_and_bbox_convention() -> None:
    source = Sa1bSource(REAL, None)
    assert len(source.keys) == 14 and source.problems == [] and Sa1bSource.splits(REAL) == []
    for key in source.keys:
        record = json.loads((REAL / f"{key}.json").read_text())
        image, instances = source.load(key), source.instances(key)
        assert (image.width, image.height) == (record["image"]["width"], record["image"]["height"])
        for instance, a in zip(instances, record["annotations"], strict=True):
            assert instance.id == a["id"] and instance.category is None
            assert instance.mask.shape == (image.height, image.width) and instance.mask.sum() == a["area"]
            rows, columns = np.nonzero(instance.mask)
            left, top, right, bottom = columns.min(), rows.min(), columns.max(), rows.max()
            assert a["bbox"] == [left, top, right - left, bottom - top]
            x, y, w, h = coco_mask.toBbox(a["segmentation"])
            assert a["bbox"] == [x, y, w - 1, h - 1]


@needs_real
def test_run_lengths_of_real_strings_draw_the_same_mask() -> None:
    for path in sorted(REAL.glob("*.json"))[:3]:
        for a in json.loads(path.read_text())["annotations"]:
            height, width = a["segmentation"]["size"]
            lengths = run_lengths(a["segmentation"]["counts"])
            drawn = np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(width, height).T
            assert np.array_equal(drawn, coco_mask.decode(a["segmentation"]))


def test_run_lengths_of_random_masks() -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (600, 40)):
        for p in (0.0, 0.002, 0.5, 1.0):
            mask = rng.random((height, width)) < p
            lengths = run_lengths(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"])
            drawn = np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(width, height).T
            assert np.array_equal(drawn, mask)
