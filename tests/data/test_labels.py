"""Labels of questions: which objects a phrase names, where the view puts them, and data whose phrases have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from samdistill.config import AugmentConfig, DataConfig, QuestionsConfig
from samdistill.data import (
    CocoSource,
    Geometry,
    MaskFolderSource,
    PhraseBook,
    QuestionDataset,
    Sa1bSource,
    ViewTransform,
)
from samdistill.data.labels import ImageLabels, Labels, collate_labels, is_phrase, require_labels
from samdistill.data.loader import ImageItem
from samdistill.data.sources import open_source
from samdistill.sandbox.write import write_sa1b
from samdistill.types import VISUAL, UserError

HEIGHT, WIDTH = 90, 120
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
PLAIN = ViewTransform(Geometry(126))
BOXES = {RED: (10, 20, 40, 50), GREEN: (60, 8, 110, 30), BLUE: (52, 40, 100, 84)}
"""Left, top, right and bottom of three objects that do not touch."""


def outline(box: tuple[int, int, int, int]) -> list[list[int]]:
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]


def record(*annotations: dict[str, Any], **image: Any) -> dict[str, Any]:
    """One image, four categories, and objects whose ``category_id`` is given."""
    names = ("cat", "dog", "puffer_(fish)", "tree")
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH, **image}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
        "annotations": [{"id": n, "image_id": 1, "iscrowd": 0, **one} for n, one in enumerate(annotations)],
    }


def coco(root: Path, content: dict[str, Any]) -> CocoSource:
    (root / "images").mkdir(parents=True, exist_ok=True)
    pixels = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    for colour, (left, top, right, bottom) in BOXES.items():
        pixels[top:bottom, left:right] = colour
    for image in content["images"]:
        Image.fromarray(pixels).save(root / "images" / image["file_name"])
    (root / "instances.json").write_text(json.dumps(content))
    return CocoSource(root, None)


def item(source: CocoSource, transform: ViewTransform = PLAIN, seed: int = 0) -> ImageItem:
    image = source.load("a")
    canvas, size = transform(image, seed)
    return ImageItem(canvas, size, (HEIGHT, WIDTH), "a", seed)


def labels(source: CocoSource, transform: ViewTransform = PLAIN, seed: int = 0, side: int = 36) -> ImageLabels:
    return ImageLabels(source, transform, item(source, transform, seed), side)


def said(found: Labels | None) -> tuple[int, bool, bool] | None:
    return None if found is None else (len(found.boxes), found.present, found.complete)


CAT, DOG = ({"category_id": 1, "segmentation": outline(BOXES[RED])},
            {"category_id": 2, "segmentation": outline(BOXES[GREEN])})  # fmt: skip


@pytest.mark.parametrize("kind", ["square", "longest_side"])
def test_a_mask_lies_on_the_pixels_that_it_labels(tmp_path: Path, kind: Any) -> None:
    """The share of a cell that is red in the augmented image is the share that the mask of the red object covers."""
    own = [{"category_id": 1, "segmentation": outline(box)} for box in BOXES.values()]
    source, side = coco(tmp_path, record(*own)), 63
    transform = ViewTransform(Geometry(252, kind), AugmentConfig(flip=0.5, crop_scale=(0.3, 1.0)))
    seen = [0, 0, 0]
    for seed in range(12):
        view = item(source, transform, seed)
        found = ImageLabels(source, transform, view, side).of_phrase("cat")
        assert found is not None and found.complete
        pixels, number = view.image.permute(1, 2, 0).int(), 0
        for slot, colour in enumerate(BOXES):
            painted = (pixels - torch.tensor(colour)).abs().sum(-1) < 128
            painted[:, view.size[1] :], painted[view.size[0] :] = False, False
            if painted.sum() < 64:  # outside the crop
                continue
            share = painted.float().view(side, 4, side, 4).mean((1, 3))
            covered = found.masks[number].float() / 255
            overlap = torch.minimum(share, covered).sum() / torch.maximum(share, covered).sum()
            assert overlap > 0.9, (seed, colour, overlap)
            rows, columns = painted.any(1).nonzero(), painted.any(0).nonzero()
            edges = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 252
            assert (found.boxes[number] - edges).abs().max() < 3 / 252, (seed, colour)
            number, seen[slot] = number + 1, seen[slot] + 1
        assert number == len(found.boxes) == len(found.masks)
    assert min(seen) >= 3


@pytest.mark.parametrize("size", [(50, 70), (70, 50), (9, 7), (5, 6)])
@pytest.mark.parametrize("kind", ["square", "longest_side"])
def test_coverage_counts_the_pixels_whose_centres_lie_in_a_cell(kind: Any, size: tuple[int, int]) -> None:
    """A cell without a pixel's centre, where the grid is the finer one, takes the pixel under its own centre."""
    geometry, side = Geometry(84, kind), 9
    masks = np.random.default_rng(0).random((2, *size)) > 0.5
    found = geometry.coverage(masks, side)
    assert found.dtype == torch.uint8 and found.shape == (2, side, side)

    def pixels(length: int, placed: int) -> list[list[int]]:
        """Pixels of each cell; those from ``length`` on are padding."""
        cell = length * 84 / placed / side
        centres = [[i for i in range(9 * length) if n <= (i + 0.5) / cell < n + 1] for n in range(side)]
        return [own or [int((n + 0.5) * cell)] for n, own in enumerate(centres)]

    height, width = geometry.placed(size)
    for mask, own in zip(masks, found.numpy(), strict=True):
        padded = np.pad(mask, ((0, 8 * size[0]), (0, 8 * size[1])))
        cells = [[padded[np.ix_(rows, columns)].mean() for columns in pixels(size[1], width)]
                 for rows in pixels(size[0], height)]  # fmt: skip
        assert np.abs(own - 255 * np.array(cells)).max() <= 1


def test_a_phrase_has_its_objects_and_an_absent_one_has_none(tmp_path: Path) -> None:
    found = labels(coco(tmp_path, record(CAT, DOG, CAT | {"segmentation": outline(BOXES[BLUE])})))
    assert said(found.of_phrase("cat")) == (2, True, True) and said(found.of_phrase("dog")) == (1, True, True)
    assert said(found.of_phrase("tree")) == (0, False, True)
    cats = found.of_phrase("cat")
    assert cats is not None and cats.masks.dtype == torch.uint8
    wanted = torch.tensor([BOXES[RED], BOXES[BLUE]]) / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    assert torch.allclose(cats.boxes, wanted, atol=1e-6)


def test_a_crowd_is_present_and_leaves_unmatched_queries_alone(tmp_path: Path) -> None:
    found = labels(coco(tmp_path, record(CAT, DOG | {"iscrowd": 1}, CAT | {"iscrowd": 1})))
    assert said(found.of_phrase("cat")) == (1, True, False)
    assert said(found.of_phrase("dog")) == (0, True, False)


def test_an_object_without_a_usable_mask_makes_its_phrase_incomplete(tmp_path: Path) -> None:
    """Otherwise its absence would be taught where it is."""
    for name, outlined in (("damaged", [1, 2, 3, 4]), ("thin", [5, 5, 5, 5, 5, 5])):
        bad, root = {"category_id": 1, "segmentation": [outlined]}, tmp_path / name
        assert said(labels(coco(root / "one", record(bad))).of_phrase("cat")) is None
        assert said(labels(coco(root / "two", record(bad, CAT))).of_phrase("cat")) == (1, True, False)


def test_what_the_view_does_not_show_is_absent_and_what_it_hardly_shows_is_unknown(tmp_path: Path) -> None:
    speck = {"category_id": 3, "segmentation": outline((70, 60, 71, 61))}
    source = coco(tmp_path, record(CAT, speck))
    assert said(labels(source).of_phrase("puffer fish")) == (1, True, True)
    small = ViewTransform(Geometry(42))  # a pixel of the image is a third of a pixel of the canvas
    assert said(labels(source, small).of_phrase("puffer fish")) is None
    crop = ViewTransform(Geometry(126), AugmentConfig(crop_scale=(0.1, 0.2)))
    answers = {said(labels(source, crop, seed).of_phrase("cat")) for seed in range(20)}
    assert answers == {(1, True, True), (0, False, True)}


def test_lvis_says_what_is_verified(tmp_path: Path) -> None:
    """cat: not exhaustive; puffer fish: verified absent; tree: nobody looked."""
    image = {"neg_category_ids": [3], "not_exhaustive_category_ids": [1]}
    source = coco(tmp_path, record(CAT, DOG, **image))
    found = labels(source)
    assert said(found.of_phrase("cat")) == (1, True, False) and said(found.of_phrase("dog")) == (1, True, True)
    assert said(found.of_phrase("puffer fish")) == (0, False, True) and said(found.of_phrase("tree")) is None
    book = PhraseBook(QuestionsConfig(source="names", negatives=1.0, per_image=4), source)
    ((_, asked, _),) = [QuestionDataset(book, PLAIN, label_side=9)[0]]
    assert {question.text for question in asked} == {"puffer fish"} and source.absent("a") == ["puffer fish"]
    unlisted = coco(tmp_path / "other", record(CAT, neg_category_ids=[]))  # then others are drawn, without labels
    book = PhraseBook(QuestionsConfig(source="names", negatives=1.0, per_image=20), unlisted)
    asked = QuestionDataset(book, PLAIN, label_side=9)[0][1]
    assert {question.text for question in asked} == {"dog", "puffer fish", "tree"}
    assert all(question.labels is None for question in asked)


def test_files_of_lvis_are_read_as_they_are_published(tmp_path: Path) -> None:
    content = record(CAT, neg_category_ids=[2])
    (image,) = content["images"]
    image |= {"coco_url": "http://images.cocodataset.org/train2017/000000000009.png"}
    del image["file_name"]
    for folder in ("train2017", "annotations"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "train2017" / "000000000009.png")
    (tmp_path / "annotations" / "lvis_v1_train.json").write_text(json.dumps(content))
    data = DataConfig(kind="coco", root=tmp_path, split="lvis_v1_train", held_out=None, held_out_fraction=0.0)
    source = open_source(data, "train")
    assert source.keys == ["train2017/000000000009"] and source.problems == []
    assert source.phrases(source.keys[0]) == ["cat"] and source.vocabulary == ["cat", "dog", "puffer fish", "tree"]


def test_a_box_has_the_objects_of_its_name(tmp_path: Path) -> None:
    own = (CAT | {"iscrowd": 1}, DOG, CAT | {"segmentation": outline(BOXES[BLUE])}, CAT | {"concepts": ["cat", "pet"]})
    found = labels(coco(tmp_path, record(*own)))
    assert said(found.of_box(0)) == said(found.of_phrase("dog")) == (1, True, True)
    assert said(found.of_box(1)) == said(found.of_phrase("cat")) == (2, True, False)
    assert said(found.of_box(2)) is None  # "cat" or "pet"


def test_questions_carry_the_labels_of_what_they_ask(tmp_path: Path) -> None:
    source = coco(tmp_path, record(CAT, DOG, DOG | {"segmentation": outline(BOXES[BLUE])}))
    book = PhraseBook(QuestionsConfig(source="names", negatives=0.4, boxes=0.4, per_image=60), source)
    _, asked, _ = QuestionDataset(book, PLAIN, label_side=9)[0]
    counts = {text: {said(q.labels) for q in asked if q.text == text} for text in ("cat", "dog", "tree", VISUAL)}
    assert counts == {
        "cat": {(1, True, True)}, "dog": {(2, True, True)}, "tree": {(0, False, True)},
        VISUAL: {(1, True, True), (2, True, True)},
    }  # fmt: skip
    for question in asked:
        if question.box is not None:  # jitter moves an edge by a twentieth of a side
            x, y, width, height = question.box
            box = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
            assert question.labels is not None and (question.labels.boxes - box).abs().amax(1).min() < 0.15
    plain = QuestionDataset(book, PLAIN)[0][1]
    assert [q[:2] for q in plain] == [q[:2] for q in asked] and all(q.labels is None for q in plain)
    assert all(q.labels is None for q in QuestionDataset(book, PLAIN, label_side=9, labelled=False)[0][1])


def test_other_masks_are_other_data(tmp_path: Path) -> None:
    """A checkpoint refuses to continue with them."""
    other = CAT | {"segmentation": outline(BOXES[BLUE])}
    sources = (coco(tmp_path / "a", record(CAT)), coco(tmp_path / "b", record(other)))
    asked = [PhraseBook(QuestionsConfig(source="names"), source) for source in sources]
    plain, labelled = ([QuestionDataset(book, PLAIN, label_side=side).identity for book in asked] for side in (None, 9))
    assert plain[0] == plain[1] and labelled[0] != labelled[1]


def test_collated_masks_are_in_the_order_of_valid() -> None:
    def some(count: int, value: int) -> Labels:
        masks = torch.full((count, 4, 4), value, dtype=torch.uint8)
        masks += torch.arange(count, dtype=torch.uint8)[:, None, None]
        return Labels(masks, torch.full((count, 4), value / 100), count > 0, value != 30)

    found = collate_labels([some(2, 10), None, some(0, 0), some(3, 30)], 4)
    assert found.valid.tolist() == [[True, True, False], [False] * 3, [False] * 3, [True] * 3]
    assert found.masks[:, 0, 0].tolist() == [10, 11, 30, 31, 32] and found.masks.dtype == torch.uint8
    assert found.boxes[3, 1].tolist() == pytest.approx([0.3] * 4) and not found.boxes[~found.valid].any()
    assert found.known.tolist() == [True, False, True, True] and found.present.tolist() == [True, False, False, True]
    assert found.complete.tolist() == [True, False, True, False]
    nothing = collate_labels([None, None], 4)
    assert nothing.masks.shape == (0, 4, 4) and nothing.valid.shape == (2, 1) and not nothing.known.any()


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("cat", True), ("traffic light", True), ("puffer_(fish)", True), ("boeing 747", True), ("t-shirt", True),
     ("mp3 player", True), ("tv", True), ("猫", True), ("The Beatles", True), ("other vehicle", True),
     ("", False), (" ", False), ("0", False), ("17", False), ("1.5", False), ("cat_17", False), ("class3", False),
     ("Category 12", False), ("N/A", False), ("n.a.", False), ("none", False), ("unknown", False),
     ("_background_", False), ("n02084071", False), ("/m/01g317", False), ("3f2a-9c01", False), ("x", False),
     ("?", False)],
)  # fmt: skip
def test_which_names_are_phrases(name: str, phrase: bool) -> None:
    assert is_phrase(name) is phrase


def test_data_without_labels_for_phrases_are_refused(tmp_path: Path) -> None:
    write_sa1b(tmp_path / "sa1b", 1, 28, seed=0)
    for folder in ("images", "masks"):
        (tmp_path / "masks" / folder).mkdir(parents=True)
        Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / "masks" / folder / "a.png")
    for source in (Sa1bSource(tmp_path / "sa1b", "train"), MaskFolderSource(tmp_path / "masks", None)):
        with pytest.raises(UserError, match=r"^loss\.label_score: the data set has masks, but no names") as refused:
            require_labels(source, "label_score")
        assert "data.kind=coco" in str(refused.value)
    bad = record(CAT)
    bad["categories"] += [{"id": n, "name": name} for n, name in enumerate(("0", "N/A", "cat_17", "", "none"), 10)]
    said = "label_mask: 5 of 9 categories are no phrases: '', '0', 'N/A', 'cat 17' and 1 more"
    with pytest.raises(UserError, match=said):
        require_labels(coco(tmp_path / "names", bad), "label_mask")
    require_labels(coco(tmp_path / "good", record(CAT)), "label_mask")


def test_phrases_whose_objects_have_no_masks_are_refused(tmp_path: Path) -> None:
    """One damaged outline among others costs its object alone; a category of boxes would teach that it is absent."""
    boxes = {"category_id": 2, "bbox": [60, 8, 50, 22]}
    with pytest.raises(UserError, match=r"label_mask: no object of 'dog' has a mask"):
        require_labels(coco(tmp_path / "a", record(CAT, boxes, boxes | {"segmentation": []})), "label_mask")
    require_labels(coco(tmp_path / "b", record(CAT, boxes, DOG)), "label_mask")
    require_labels(coco(tmp_path / "c", record(CAT, DOG | {"segmentation": [[1, 2, 3, 4]]})), "label_mask")
