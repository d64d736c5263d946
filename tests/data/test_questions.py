"""Phrases, boxes and questions."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.ops import box_convert

from samdistill.config import AugmentConfig, QuestionsConfig
from samdistill.data import (
    CocoSource,
    FolderSource,
    Geometry,
    PhraseBook,
    Question,
    QuestionDataset,
    QuestionItem,
    Sa1bSource,
    ViewTransform,
    collate_questions,
)
from samdistill.ops.masks import masks_to_boxes
from samdistill.sandbox.write import write_coco, write_sa1b
from samdistill.types import VISUAL, UserError

PLAIN = ViewTransform(Geometry(28))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> CocoSource:
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, 12, 48, seed=1)
    return CocoSource(root, "train")


@pytest.fixture
def folder(tmp_path: Path) -> FolderSource:
    for name in "abcd":
        path = tmp_path / f"images/{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 10), (ord(name), 0, 0)).save(path)
    return FolderSource(tmp_path / "images")


def config(**fields: object) -> QuestionsConfig:
    return QuestionsConfig.model_validate({"source": "names", **fields})


def jsonl(source: FolderSource, *lines: object) -> QuestionsConfig:
    path = source.root.parent / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return config(source="jsonl", file=path)


def test_generic_phrases_are_asked_of_every_image_evenly(folder: FolderSource) -> None:
    book = PhraseBook(config(source="generic", generic=("person", "a  car", "dog"), per_image=2), folder)
    assert book.keys == folder.keys and book.vocabulary == ("a car", "dog", "person")
    asked: Counter[str] = Counter()
    for epoch in range(300):
        for _, questions, _ in (QuestionDataset(book, PLAIN, epoch=epoch)[i] for i in range(4)):
            first, second = questions
            assert first.text != second.text and first.box is None
            asked.update((first.text, second.text))
    assert set(asked) == set(book.vocabulary)
    assert max(asked.values()) - min(asked.values()) < 0.15 * 800  # 800 of each


def test_lines_give_phrases_and_captions(folder: FolderSource) -> None:
    lines = [
        {"key": "a.png", "phrases": ["red  car", "dog"]},
        "",
        {"key": "b.png", "caption": " A dog\ton grass. "},
        {"key": "a.png", "caption": "A street."},
        {"key": "c.png", "phrases": []},
        {"key": "z", "phrases": ["ufo"]},
    ]
    book = PhraseBook(jsonl(folder, *lines), folder)
    assert book.keys == ["a.png", "b.png"] and len(book.unasked) == 2
    assert book.phrases("a.png") == ("red car", "dog", "A street.") and book.phrases("b.png") == ("A dog on grass.",)
    assert book.vocabulary == ("A dog on grass.", "A street.", "dog", "red car")
    assert {item.key for item, _, _ in QuestionDataset(book, PLAIN)} == {"a.png", "b.png"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("line", "complaint"), [
    ("{", "EOF"), ("[]", "an object"), ({"key": "a.png"}, r"fields \['key'\]; a line is"),
    ({"key": "a.png", "phrases": ["x"], "caption": "y"}, "a line is"),
    ({"key": "a.png", "phrases": ["x"], "lang": "en"}, "fields .*'lang'"),
    ({"key": "a.png", "phrases": "dog"}, "a list of texts"), ({"key": 3, "caption": "dog"}, "'key' is a text"),
    ({"key": "a.png", "phrases": ["dog", " "]}, "empty or not"), ({"key": "a.png", "caption": None}, "not a text"),
])  # fmt: skip
def test_a_broken_line_is_named_by_file_and_number(folder: FolderSource, line: object, complaint: str) -> None:
    questions = jsonl(folder, {"key": "a.png", "phrases": ["dog"]}, "", line)
    with pytest.raises(UserError, match=rf"questions\.jsonl:3: .*{complaint}"):
        PhraseBook(questions, folder)


def test_files_that_ask_nothing(folder: FolderSource) -> None:
    with pytest.raises(UserError, match=r"jsonl is empty"):
        PhraseBook(jsonl(folder, ""), folder)
    with pytest.raises(UserError, match=r"none of its 1 keys is in the data set; keys look like 'a.png', not 'a'"):
        PhraseBook(jsonl(folder, {"key": "a", "phrases": ["dog"]}), folder)
    with pytest.raises(UserError, match="no image has a phrase"):
        PhraseBook(jsonl(folder, {"key": "a.png", "phrases": []}), folder)
    with pytest.raises(UserError, match="cannot read"):
        PhraseBook(config(source="jsonl", file=folder.root / "none.jsonl"), folder)
    (folder.root / "latin.jsonl").write_bytes(b'{"key": "a.png", "caption": "caf\xe9"}')
    with pytest.raises(UserError, match="cannot read"):
        PhraseBook(config(source="jsonl", file=folder.root / "latin.jsonl"), folder)


def test_what_does_not_fit_is_dropped_whole_and_counted(folder: FolderSource) -> None:
    questions = jsonl(folder, {"key": "a.png", "phrases": ["dog", "a very long phrase"]},
                      {"key": "b.png", "caption": "a very long phrase"})  # fmt: skip
    book = PhraseBook(questions, folder, lambda phrase: len(phrase.split()) <= 2)
    assert book.keys == ["a.png"] and book.phrases("a.png") == book.vocabulary == ("dog",) and len(book.unasked) == 3
    assert [bad.key for bad in book.dropped] == ["'a very long phrase'"]
    with pytest.raises(UserError, match="2 phrases are too long, such as 'a very long phrase'"):
        PhraseBook(questions, folder, lambda phrase: False)


def test_names_come_from_the_labels(coco: CocoSource, folder: FolderSource) -> None:
    book = PhraseBook(config(), coco)
    assert book.keys == [key for key in coco.keys if coco.instances(key)] and len(book.keys) >= 11
    for key in book.keys:
        pairs = [i.category.split() for i in coco.instances(key)]  # type: ignore[union-attr]
        expected = {word for colour, shape in pairs for word in (colour, shape, f"{colour} {shape}")}
        assert set(book.phrases(key)) == expected and len(book.phrases(key)) == len(expected)
    assert set(book.vocabulary) == {phrase for key in book.keys for phrase in book.phrases(key)}
    with pytest.raises(UserError, match=r"questions\.source=names: no image has a phrase"):
        PhraseBook(config(), folder)


@pytest.mark.parametrize("name", ["", " "])
def test_a_category_without_a_name_is_no_question(tmp_path: Path, name: str) -> None:
    rectangle(tmp_path, (10, 10, 40, 40))
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"categories": [{"id": 1, "name": name}]}))
    with pytest.raises(UserError, match=r"questions\.source=names: a category has an empty name"):
        PhraseBook(config(), CocoSource(tmp_path, None))
    assert PhraseBook(config(source="generic"), CocoSource(tmp_path, None)).vocabulary


def test_absent_phrases_are_drawn_evenly_from_the_others(folder: FolderSource) -> None:
    many = [f"p{i}" for i in range(40)]
    book = PhraseBook(jsonl(folder, {"key": "a.png", "phrases": ["Dog", *many[:38]]},
                            {"key": "b.png", "phrases": ["dog", "cat", *many]}), folder)  # fmt: skip
    rng = random.Random(0)
    drawn = Counter(book.absent("a.png", rng) for _ in range(900))
    assert set(drawn) == {"cat", "p38", "p39"} and min(drawn.values()) > 240
    assert book.absent("b.png", rng) is None


def items(dataset: QuestionDataset) -> list[QuestionItem]:
    return [dataset[i] for i in range(len(dataset))]


def test_shares_are_those_of_the_config(coco: CocoSource) -> None:
    book = PhraseBook(config(per_image=200, negatives=0.3, boxes=0.25), coco)
    shown = absent = words = 0
    for item, questions, bad in items(QuestionDataset(book, PLAIN)):
        assert len(questions) == 200 and bad == ()
        for question in questions:
            assert (question.text == VISUAL) == (question.box is not None)
            shown += question.box is not None
            if question.box is None:
                words += 1
                absent += question.text not in coco.phrases(item.key)
                assert question.text in book.vocabulary
    assert shown / (shown + words) == pytest.approx(0.25, abs=0.03)
    assert absent / words == pytest.approx(0.3, abs=0.03)
    only = items(QuestionDataset(PhraseBook(config(per_image=20, negatives=1.0), coco), PLAIN))
    assert all(q.text not in coco.phrases(item.key) for item, questions, _ in only for q in questions)


def test_questions_depend_on_seed_key_and_epoch_alone(coco: CocoSource) -> None:
    questions = config(per_image=5, negatives=0.3, boxes=0.3)
    transform = ViewTransform(Geometry(28), AugmentConfig(flip=0.5, crop_scale=(0.3, 1.0)))
    book = PhraseBook(questions, coco)
    base = items(QuestionDataset(book, transform, seed=1, epoch=3, views=2))
    random.seed(5)
    fewer = CocoSource(coco.images.parents[1], "train")
    fewer.keys = fewer.keys[5:]
    part = QuestionDataset(PhraseBook(questions, fewer), transform, seed=1, epoch=3, views=2)
    place = {item.key: (item, asked) for item, asked, _ in base}
    for item, asked, _ in items(part):
        same, expected = place[item.key]
        assert torch.equal(item.image, same.image) and item.seed == same.seed
        # negatives may come from other images, so only what the image itself gives must agree
        assert [q for q in asked if q.box] == [q for q in expected if q.box]
    for other in ({"seed": 1, "epoch": 5}, {"seed": 2, "epoch": 3}):
        changed = items(QuestionDataset(book, transform, views=2, **other))
        assert sum(a[1] != b[1] for a, b in zip(changed, base, strict=True)) > 8
        same_view = all(torch.equal(a[0].image, b[0].image) for a, b in zip(changed, base, strict=True))
        assert same_view == (other["seed"] == 1)  # epochs 3 and 5 are both view 1


def test_batches_do_not_depend_on_workers_or_process(coco: CocoSource) -> None:
    dataset = QuestionDataset(PhraseBook(config(per_image=3, negatives=0.3, boxes=0.3), coco), PLAIN, seed=4, epoch=2)

    def everything(workers: int) -> list[object]:
        loader = DataLoader(dataset, 4, num_workers=workers, collate_fn=collate_questions)
        return [(b.images.numpy().tobytes(), b.keys, p.texts, p.image.tolist(), p.boxes.tolist(), p.labels.tolist())
                for b, p, _ in loader]  # fmt: skip

    reference = everything(0)
    assert everything(2) == reference and len(reference) == -(-len(dataset) // 4)
    code = (
        "import sys\nfrom pathlib import Path\nfrom samdistill.config import QuestionsConfig\n"
        "from samdistill.data import *\n"
        "q = QuestionsConfig(source='names', per_image=3, negatives=0.3, boxes=0.3)\n"
        "book = PhraseBook(q, CocoSource(Path(sys.argv[1]), 'train'))\n"
        "d = QuestionDataset(book, ViewTransform(Geometry(28)), seed=4, epoch=2)\n"
        "print([d[i][1] for i in range(len(d))])"
    )
    command = [sys.executable, "-c", code, str(coco.images.parents[1])]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert out.strip() == str([asked for _, asked, _ in items(dataset)])


def rectangle(root: Path, box: tuple[int, int, int, int], size: tuple[int, int] = (80, 120)) -> CocoSource:
    """One black picture with one white rectangle, which is annotated."""
    left, top, right, bottom = box
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    (root / "images").mkdir(parents=True)
    Image.fromarray(pixels).save(root / "images/a.png")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [[0, 0, 1, 0, 1, 1]],
                  "bbox": [left, top, right - left, bottom - top]}  # fmt: skip
    content = {"images": [{"id": 1, "file_name": "a.png", "height": size[0], "width": size[1]}],
               "categories": [{"id": 1, "name": "box"}], "annotations": [annotation]}  # fmt: skip
    (root / "instances.json").write_text(json.dumps(content))
    return CocoSource(root, None)


@pytest.mark.parametrize("kind", ["square", "longest_side"])
def test_a_shown_box_lies_where_the_object_is_on_the_canvas(tmp_path: Path, kind: str) -> None:
    book = PhraseBook(config(boxes=1.0, jitter=0.0), rectangle(tmp_path, (15, 30, 40, 50)))
    transform = ViewTransform(Geometry(112, kind), AugmentConfig(flip=0.5, crop_scale=(0.1, 1.0)))  # type: ignore[arg-type]
    shown = words = 0
    for epoch in range(80):
        item, (question,), _ = QuestionDataset(book, transform, epoch=epoch, views=80)[0]
        height, width = item.size
        seen = masks_to_boxes((item.image[0, :height, :width] > 127)[None])[0]
        if question.box is None:
            words += 1
            assert question.text == "box" and (seen[2:] - seen[:2]).min() <= 1
        else:
            shown += 1
            box = box_convert(torch.tensor(question.box), "cxcywh", "xyxy") * 112
            assert question.text == VISUAL and (box - seen).abs().max() <= 1.01
    assert shown > 30 and words > 3


def test_jitter_moves_each_edge_by_its_share_and_stays_inside(tmp_path: Path) -> None:
    book = PhraseBook(config(boxes=1.0, jitter=0.1, per_image=1000), rectangle(tmp_path / "a", (30, 20, 90, 60)))
    _, questions, _ = QuestionDataset(book, ViewTransform(Geometry(120, "longest_side")))[0]
    boxes = box_convert(torch.tensor([q.box for q in questions]), "cxcywh", "xyxy") * 120
    off = (boxes - torch.tensor([30, 20, 90, 60])) / torch.tensor([60, 40, 60, 40])
    assert off.abs().max() <= 0.2 + 1e-5 and off.mean(0).abs().max() < 0.01
    assert off.std(0).tolist() == pytest.approx([0.096] * 4, rel=0.1)  # 0.1, less the tails beyond 0.2
    assert torch.corrcoef(off.T).fill_diagonal_(0).abs().max() < 0.15

    wild = config(boxes=1.0, jitter=0.49, per_image=1000)
    book = PhraseBook(wild, rectangle(tmp_path / "b", (80, 50, 120, 53)))  # in the corner, three pixels high
    item, questions, _ = QuestionDataset(book, ViewTransform(Geometry(120, "longest_side")))[0]
    boxes = box_convert(torch.tensor([q.box for q in questions]), "cxcywh", "xyxy") * 120
    assert item.size == (80, 120) and bool((boxes[:, 2] <= 120.001).all()) and bool((boxes[:, 3] <= 80.001).all())
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= 0.999 and boxes.min() >= 0


def test_boxes_need_labels_and_sa1b_boxes_are_edge_to_edge(tmp_path: Path, folder: FolderSource) -> None:
    with pytest.raises(UserError, match="no annotated objects"):
        PhraseBook(config(source="generic", boxes=0.1), folder)
    write_sa1b(tmp_path / "sa1b", 4, 48, seed=1)
    source, count = Sa1bSource(tmp_path / "sa1b", "train"), 0
    for key in source.keys:
        masks = torch.from_numpy(np.array([i.mask for i in source.instances(key)]))
        assert source.boxes(key).tolist() == masks_to_boxes(masks).tolist()
        count += len(masks)
    assert count > 4
    book = PhraseBook(config(source="generic", boxes=1.0), source)
    assert all(asked[0].text == VISUAL for _, asked, _ in items(QuestionDataset(book, ViewTransform(Geometry(48)))))


def test_a_bad_image_gives_its_place_to_the_next(coco: CocoSource, tmp_path: Path) -> None:
    root = Path(shutil.copytree(coco.images.parents[1], tmp_path / "coco"))
    source = CocoSource(root, "train")
    book = PhraseBook(config(boxes=0.5), source)
    keys, last = book.keys, len(book.keys) - 1
    for key in (keys[3], keys[last]):
        source.path(key).write_bytes(b"broken")
    source._records[keys[4]]["height"] += 1  # the annotation of the one behind is of another image
    dataset = QuestionDataset(book, PLAIN, epoch=1)
    assert [(i.key, [b.key for b in bad]) for i, _, bad in (dataset[3], dataset[4], dataset[5], dataset[last])] == [
        (keys[5], [keys[3], keys[4]]), (keys[5], [keys[4]]), (keys[5], []), (keys[0], [keys[last]]),
    ]  # fmt: skip
    assert dataset[3][1] == dataset[5][1] and torch.equal(dataset[3][0].image, dataset[5][0].image)
    _, _, bad = collate_questions([dataset[3], dataset[5], dataset[last]])
    assert [b.key for b in bad] == [keys[3], keys[4], keys[last]] and "not a readable image" in bad[0].reason
    for key in keys:
        source.path(key).unlink()
    with pytest.raises(UserError, match=f"{len(keys)} images in a row cannot be read, first {keys[2]}: "):
        dataset[2]


def test_the_search_for_a_readable_image_ends(folder: FolderSource) -> None:
    folder.keys = [f"{i:03d}.png" for i in range(80)]
    dataset = QuestionDataset(PhraseBook(config(source="generic"), folder), PLAIN)
    Image.new("RGB", (9, 9)).save(folder.path("064.png"))
    assert dataset[1][0].key == "064.png" and len(dataset[1][2]) == 63
    with pytest.raises(UserError, match=r"64 images in a row cannot be read, first 000\.png"):
        dataset[0]


def test_collate_has_slots_for_boxes_only_where_boxes_are_shown(folder: FolderSource) -> None:
    dataset = QuestionDataset(PhraseBook(config(source="generic", per_image=2), folder), PLAIN)
    batch, prompts, bad = collate_questions([dataset[2], dataset[0]])
    assert batch.keys == ("c.png", "a.png") and bad == [] and prompts.image.tolist() == [0, 0, 1, 1]
    assert prompts.texts == tuple(q.text for i in (2, 0) for q in dataset[i][1])
    assert prompts.boxes.shape == (4, 0, 4) and prompts.labels.shape == (4, 0)
    shown = Question(VISUAL, (0.5, 0.25, 0.5, 0.125))
    item = (dataset[1][0], (Question("dog"), shown), ())
    batch, prompts, _ = collate_questions([dataset[0], item])
    assert prompts.boxes.shape == (4, 1, 4) and prompts.boxes.dtype == torch.float32
    assert prompts.labels.tolist() == [[-10], [-10], [-10], [1]] and prompts.labels.dtype == torch.int64
    assert prompts.boxes[3, 0].tolist() == [0.5, 0.25, 0.5, 0.125] and prompts.texts[2:] == ("dog", VISUAL)
    assert len(batch) == 2 and len(prompts) == 4
