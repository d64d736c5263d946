"""Detectors on pairs of image and phrase: figures that are known beforehand, what is skipped, and what is drawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F

from samdistill.checkpoints.words import Words
from samdistill.data.saco import ConceptPair, ConceptSet, to_rle, write_concepts
from samdistill.data.saco_predictions import load_predictions, write_predictions
from samdistill.evaluation import concepts as module
from samdistill.evaluation.concept_result import ConceptResult
from samdistill.evaluation.concepts import evaluate_concepts, score_files, some_images
from samdistill.inference.drawing import COLOURS, draw_instances
from samdistill.sandbox.concepts import CONTEXT, build_tokenizer
from samdistill.sandbox.write import write_coco, write_concept_set
from samdistill.types import ConceptPrompts, DetectorOutput, ImageBatch, UserError

SIZE, QUERIES = 60, 6
PERFECT = pytest.approx(1, abs=2e-4)
"""But for the small terms in the denominators."""
Says = Callable[[ConceptPair], float]


class Oracle:
    """Knows the ground truth. says: how sure it is that a pair has an object; a mask of all ones where it has none."""

    image_size = SIZE
    words = Words(build_tokenizer(), CONTEXT)

    def __init__(self, truth: ConceptSet, says: Says = lambda pair: 9.0 if pair.rles else -9.0) -> None:
        self.truth, self.says, self.calls = truth, says, list[tuple[int, int]]()
        self.model = torch.nn.Linear(3, 5)
        self.pairs = {(pair.file_name, pair.text): pair for pair in truth.pairs}

    def answer(self, images: ImageBatch, prompts: ConceptPrompts) -> DetectorOutput:
        assert not self.model.training
        self.calls.append((len(images), len(prompts)))
        count = len(prompts)
        masks = torch.full((count, QUERIES, SIZE, SIZE), 1.0)
        logits, presence = torch.full((count, QUERIES), -9.0), torch.zeros(count, 1)
        for row, (text, image) in enumerate(zip(prompts.texts, prompts.image.tolist(), strict=True)):
            pair = self.pairs.get((images.keys[image], text))
            if pair is None:  # the question that is timed
                continue
            presence[row] = self.says(pair)
            logits[row, : max(1, len(pair.rles))] = 9
            for slot, mask in enumerate(self.truth.masks(pair)):
                masks[row, slot] = F.interpolate(torch.from_numpy(mask)[None, None].float(), (SIZE, SIZE))[0, 0] * 2 - 1
        flat = torch.zeros(count, 1, 1, 1)
        return DetectorOutput(masks, torch.zeros(count, QUERIES, 4), logits, presence, flat, (flat,), flat)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six scenes with four questions each; read only."""
    folder = tmp_path_factory.mktemp("concepts")
    write_coco(folder, 6, SIZE, 3, "val")
    write_concept_set(folder, 6, SIZE, 3)
    return folder


@pytest.fixture(scope="module")
def truth(root: Path) -> ConceptSet:
    return ConceptSet.load(root / "concepts_val.json")


@pytest.fixture(scope="module")
def measured(truth: ConceptSet) -> ConceptResult:
    """One that knows, one that sees something in every image, one that is silent on half of the images."""
    names = sorted({pair.file_name for pair in truth.pairs})
    models = {
        "knows": Oracle(truth), "eager": Oracle(truth, lambda pair: 9.0),
        "shy": Oracle(truth, lambda pair: 9.0 if pair.rles and names.index(pair.file_name) % 2 else -9.0),
    }  # fmt: skip
    return evaluate_concepts(models, truth, teacher="knows", pictures=5, repeats=2)


def test_figures_that_are_known_beforehand(measured: ConceptResult, truth: ConceptSet) -> None:
    knows, eager, shy = measured.rows
    assert [knows.cgf1, knows.pmf1, knows.il_mcc, knows.f1_50, knows.f1_75] == [PERFECT] * 5
    assert knows.mask_ap == pytest.approx(1) and knows.kept is None
    assert eager.il_mcc == 0 and eager.cgf1 == 0 and eager.kept == 0 and eager.pmf1 == PERFECT
    assert 0 < eager.mask_ap < 1  # what it sees where nothing is ranks as high as what it knows
    there = [pair for pair in truth.pairs if pair.rles]
    names = sorted({pair.file_name for pair in truth.pairs})
    seen = [pair for pair in there if names.index(pair.file_name) % 2]
    hits, objects = sum(len(pair.rles) for pair in seen), sum(len(pair.rles) for pair in there)
    assert shy.pmf1 == pytest.approx(2 * hits / (hits + objects), abs=2e-4)
    absent = len(truth.pairs) - len(there)
    # Matthews correlation of (tp, fn, fp, tn) = (seen, unseen, 0, absent)
    unseen = len(there) - len(seen)
    mcc = len(seen) * absent / (len(seen) * (len(seen) + unseen) * absent * (absent + unseen)) ** 0.5
    assert [shy.il_mcc, shy.cgf1, shy.kept] == pytest.approx([mcc, shy.pmf1 * mcc, shy.pmf1 * mcc], abs=2e-4)
    assert measured.images == 6 and measured.questions == len(truth.pairs) and measured.positives == len(there)


def test_the_score_without_an_image_is_that_of_the_other_images(measured: ConceptResult, truth: ConceptSet) -> None:
    found = measured.score("shy")
    assert (found.value, found.measured_on) == (measured.row("shy").cgf1, "24 questions about 6 images")
    assert list(found.without) == [str(path) for path in truth.by_image()]
    for path in truth.by_image():
        others = replace(truth, pairs=tuple(pair for pair in truth.pairs if truth.path(pair) != path))
        alone = score_files({"shy": measured.predictions["shy"]}, others).row("shy").cgf1
        assert found.without[str(path)] == pytest.approx(alone, abs=1e-12)


def test_the_threshold_decides_what_counts_and_not_what_is_ranked(truth: ConceptSet) -> None:
    doubtful = {"one": Oracle(truth, lambda pair: 9.0 if pair.rles else -0.85)}  # a score of 0.3 where nothing is
    for threshold, mcc in ((0.25, 0), (0.35, 1)):
        result = evaluate_concepts(doubtful, truth, threshold=threshold, pictures=0, repeats=0)
        (row,) = result.rows
        assert row.il_mcc == pytest.approx(mcc, abs=1e-6) and row.mask_ap == pytest.approx(
            1
        )  # those of 0.3 rank below all that is right
        assert {len(found) for found in result.predictions["one"].values()} == {QUERIES}


def test_all_that_counts_is_kept_however_many(truth: ConceptSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 1)
    result = evaluate_concepts({"one": Oracle(truth)}, truth, pictures=0, repeats=0)
    assert result.row("one").cgf1 == PERFECT  # pairs have up to three objects
    kept = {len(result.predictions["one"][pair.id]) - max(1, len(pair.rles)) for pair in truth.pairs}
    assert kept == {0} and max(len(pair.rles) for pair in truth.pairs) > 1


def test_cost_and_its_conditions(measured: ConceptResult) -> None:
    assert {row.parameters for row in measured.rows} == {20}  # 3 x 5 weights and 5 biases
    assert all(row.latency_ms > 0 for row in measured.rows) and measured.conditions.repeats == 2


def test_it_is_said_in_a_table_and_as_plain_data(measured: ConceptResult) -> None:
    said = json.loads(json.dumps(measured.to_dict()))
    assert [row["name"] for row in said["models"]] == ["knows", "eager", "shy"] and said["models"][0]["cgf1"] == PERFECT
    assert said["figures"]["shy"]["recall_50"] < said["figures"]["knows"]["recall_50"] == PERFECT
    assert said["annotators"] == 1 and said["iou"] == "masks"
    assert said["questions"] == measured.questions and said["teacher"] == "knows" and "predictions" not in said
    console = Console(width=80)
    with console.capture() as shown:
        console.print(measured.table())
    (line,) = (line for line in shown.get().splitlines() if " cgF1  " in line)
    assert "1.000" in line and "0.000" in line
    assert max(map(len, shown.get().splitlines())) <= 80


def test_the_written_predictions_score_alike(measured: ConceptResult, truth: ConceptSet, tmp_path: Path) -> None:
    for name, found in measured.predictions.items():
        write_predictions(tmp_path / f"{name}.json", found)
    files = {name: load_predictions(tmp_path / f"{name}.json") for name in measured.names}
    again = score_files(files, truth, teacher="knows")
    for row, before in zip(again.rows, measured.rows, strict=True):
        assert row == replace(before, parameters=None, latency_ms=None)


def test_an_image_is_asked_all_its_questions_at_once(truth: ConceptSet, monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = Oracle(truth), list[int]()
    evaluate_concepts({"one": model}, truth, batch_size=4, pictures=0, repeats=0, progress=done.append)
    counts = [len(pairs) for pairs in truth.by_image().values()]
    assert model.calls == [(4, sum(counts[:4])), (2, sum(counts[4:]))] and done == [n for _, n in model.calls]
    monkeypatch.setattr(module, "AT_ONCE", 3)
    model.calls.clear()
    pieces = evaluate_concepts({"one": model}, truth, batch_size=4, pictures=0, repeats=0)
    assert sum(n for _, n in model.calls) == len(truth.pairs) and max(n for _, n in model.calls) == 3
    assert pieces.row("one").cgf1 == PERFECT


def test_fewer_images_are_spread_over_the_file(truth: ConceptSet) -> None:
    paths = list(truth.by_image())
    assert list(some_images(truth, 3).by_image()) == paths[::2] and some_images(truth, None) is truth
    result = evaluate_concepts({"one": Oracle(truth)}, truth, images=2, repeats=0)
    assert result.images == 2 and result.row("one").cgf1 == PERFECT and result.conditions is None


def test_training_goes_on_as_it_was(truth: ConceptSet) -> None:
    model = Oracle(truth)
    model.model.train()
    evaluate_concepts({"one": model}, truth, images=1, pictures=0, repeats=0)
    assert model.model.training


def test_what_cannot_be_used_is_skipped_and_listed(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    first, second, third, *_ = sorted((tmp_path / "images" / "val").iterdir())
    first.write_bytes(first.read_bytes()[:300])
    Image.new("RGB", (SIZE, SIZE + 1)).save(second)
    truth = ConceptSet.load(tmp_path / "concepts_val.json")
    long = "red red red red red red star"
    pairs = [replace(p, text=long) if p.file_name.endswith(third.name) and not p.rles else p for p in truth.pairs]
    result = evaluate_concepts({"one": Oracle(truth)}, replace(truth, pairs=tuple(pairs)), pictures=0, repeats=0)
    reasons = {bad.key: bad.reason for bad in result.skipped}
    assert len(result.skipped) == 3 and result.images == 4 and result.row("one").pmf1 == PERFECT
    assert "not a readable image" in reasons[str(first)]
    assert f"is {SIZE} x {SIZE} pixels, its image {SIZE} x {SIZE + 1}" in reasons[str(second)]
    assert "longer than the 6 tokens" in reasons[repr(long)]
    for path in truth.by_image():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no image could be read, 6 skipped"):
        evaluate_concepts({"one": Oracle(truth)}, truth, repeats=0)


def test_an_image_of_any_shape_is_scored_in_its_own_pixels(tmp_path: Path) -> None:
    """Twice as wide as high and larger than the canvas: with padding and without, masks come back in place."""
    mask = np.zeros((80, 160), bool)
    mask[16:48, 32:128] = True
    Image.new("RGB", (160, 80)).save(tmp_path / "a.png")
    write_concepts(tmp_path / "concepts.json", [ConceptPair(1, "a.png", "star", 80, 160, (to_rle(mask),))])
    truth = ConceptSet.load(tmp_path / "concepts.json")
    for geometry, box in (("square", (12, 36, 12, 48)), ("longest_side", (6, 18, 12, 48))):
        top, bottom, left, right = box  # of the mask on a canvas of 60

        class Painter(Oracle):
            def answer(self, images: ImageBatch, prompts: ConceptPrompts) -> DetectorOutput:
                found = super().answer(images, prompts)
                found.pred_masks.fill_(-1)[:, :, top:bottom, left:right] = 1  # noqa: B023
                return found

        (row,) = evaluate_concepts({"one": Painter(truth)}, truth, geometry=geometry, pictures=0, repeats=0).rows
        assert row.f1_50 == row.f1_75 == PERFECT and row.pmf1 > 0.75


def test_pictures_show_everybody_and_something_absent(measured: ConceptResult, truth: ConceptSet) -> None:
    assert len(measured.pictures) == 5
    absent = {(pair.file_name, pair.text) for pair in truth.pairs if not pair.rles}
    negative = [(p.key, p.prompt) in absent for p in measured.pictures]
    assert 1 <= sum(negative) < 5
    for picture, none in zip(measured.pictures, negative, strict=True):
        assert [panel.title for panel in picture.panels] == ["image", "ground truth", "knows", "eager", "shy"]
        asked = next(p for p in truth.pairs if (p.file_name, p.text) == (picture.key, picture.prompt))
        assert [panel.found for panel in picture.panels[:4]] == [None, *[len(asked.rles)] * 2, max(1, len(asked.rles))]
        image, drawn, knows, eager, _ = (panel.image.astype(int) for panel in picture.panels)
        assert image.shape == (384, 384, 3)
        assert (np.abs(drawn - image).max() > 50) == (not none) and (np.abs(knows - image).max() > 50) == (not none)
        assert np.abs(eager - image).max() > 50


def test_labels_stand_at_their_boxes_and_inside_the_image() -> None:
    image = np.full((200, 300, 3), 128, np.uint8)
    masks = torch.zeros(2, 200, 300, dtype=torch.bool)
    boxes = torch.tensor([[100.0, 80, 180, 150], [250.0, 0, 300, 40]])  # the second reaches into a corner
    plain, drawn = (draw_instances(image, masks, boxes, labels).astype(int) for labels in (["", ""], ["0.97", "0.51"]))
    for number, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        assert plain[bottom - 1, left].tolist() == list(COLOURS[number]) == plain[top, right - 1].tolist()
    changed = np.argwhere((plain != drawn).any(-1))
    first = changed[(changed[:, 1] < 200)]
    assert len(first) > 100 and first[:, 0].min() >= 60 and first[:, 0].max() <= 80 and first[:, 1].min() >= 100
    second = changed[changed[:, 1] >= 200]
    assert len(second) > 100 and second[:, 0].max() < 30  # pushed down from beyond the upper edge
    assert image.min() == 128  # the original is untouched
