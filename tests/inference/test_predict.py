"""``predict`` and ``evaluate --concepts`` as a user calls them, with a tiny student of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import samdistill
from samdistill.cli import main
from samdistill.data.saco import ConceptSet
from samdistill.data.saco_predictions import load_predictions
from samdistill.inference.concepts import load_concept_model
from samdistill.sandbox.concepts import VOCABULARY, sandbox_words
from samdistill.sandbox.write import write_coco, write_concept_set
from samdistill.students import EfficientSam3Model, efficient_sam3_config

TEXT = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "projection_dim": 32}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a student that sees something everywhere."""
    folder = tmp_path_factory.mktemp("run")
    student = EfficientSam3Model(efficient_sam3_config("efficientvit_b0", 126, 32, 2, 64, 1, 1, 5, TEXT))
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    student.save_pretrained(folder / "student")
    sandbox_words().save(folder / "student")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three wide scenes and their questions."""
    folder = tmp_path_factory.mktemp("world")
    write_coco(folder, 3, (60, 90), 3, "val")
    write_concept_set(folder, 3, (60, 90), 3)
    return folder


@pytest.fixture(scope="module")
def image(world: Path) -> Path:
    return next((world / "images" / "val").iterdir())


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard output of a command that must succeed."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that must end as a user's error."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith(f"samdistill {arguments[0]}: "), text
    return text


def test_instances_are_printed_drawn_and_written(
    capsys: pytest.CaptureFixture[str], run: Path, image: Path, tmp_path: Path
) -> None:
    words = ("predict", image, run, "--text", "red circle", "--box", "10,5,40,50", "--threshold", "0")
    found = json.loads(ask(capsys, *words, "--json", "--out", tmp_path / "seen.png"))
    assert found["image"] == str(image) and found["text"] == "red circle" and found["boxes"] == [[10, 5, 40, 50]]
    assert len(found["instances"]) == 5 and 0 < found["presence"] < 1
    scores = [one["score"] for one in found["instances"]]
    assert scores == sorted(scores, reverse=True) and max(scores) <= found["presence"]
    for one in found["instances"]:
        mask = coco_mask.decode(one["segmentation"])
        assert mask.shape == (60, 90) and mask.sum() == one["area"]
        left, top, right, bottom = one["box"]
        assert 0 <= left <= right <= 90 and 0 <= top <= bottom <= 60
    with Image.open(tmp_path / "seen.png") as drawn, Image.open(image) as original:
        assert drawn.size == original.size
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(original)).max() > 60
    lines = ask(capsys, *words).splitlines()
    assert len(lines) == 6 and lines[0].startswith(f"{scores[0]:.3f}  box ")
    assert lines[-1].endswith(
        f"5 instances for 'red circle' and 1 box, scores from 0, presence {found['presence']:.3f}"
    )
    nothing = ask(capsys, "predict", image, run, "--text", "star", "--threshold", "1").splitlines()
    assert len(nothing) == 1 and "0 instances for 'star'" in nothing[0]


def test_it_is_a_function_too(run: Path, image: Path, near) -> None:
    model = load_concept_model(run)
    by_path = samdistill.predict(image, run, text="star", threshold=0)
    loaded = samdistill.predict(Image.open(image), model, text="star", threshold=0)
    near(by_path.boxes, loaded.boxes)
    assert loaded.name == ""
    boxed = samdistill.predict(image, model, boxes=[(10, 5, 40, 50)], threshold=0)
    assert not torch.equal(boxed.scores, loaded.scores)
    padded = samdistill.predict(image, model, text="star", threshold=0, geometry="longest_side")
    assert padded.masks.shape == loaded.masks.shape
    assert not torch.equal(padded.boxes, loaded.boxes)


ERRORS = {
    "no image": (["MISSING", "RUN", "--text", "star"], "no such image"),
    "no picture": (["JSON", "RUN", "--text", "star"], "not a readable image"),
    "nothing asked": (["IMAGE", "RUN"], "give --text, --box or both"),
    "no words": (["IMAGE", "RUN", "--text", " "], "--text: empty"),
    "too many words": (["IMAGE", "RUN", "--text", "red red red red red star"], "longer than the 6 tokens"),
    "three numbers": (["IMAGE", "RUN", "--box", "1,2,3"], "--box: '1,2,3' is not left,top,right,bottom"),
    "no numbers": (["IMAGE", "RUN", "--box", "a,b,c,d"], "--box: 'a,b,c,d' is not"),
    "reversed": (["IMAGE", "RUN", "--box", "40,5,10,50"], "--box: 40,5,10,50 is empty"),
    "no area": (["IMAGE", "RUN", "--box", "10,5,10,50"], "10,5,10,50 is empty"),
    "outside": (["IMAGE", "RUN", "--box", "10,5,91,50"], "reaches beyond the image, which is 90 x 60 pixels"),
    "second box": (["IMAGE", "RUN", "--box", "1,5,9,50", "--box", "1,5,9,61"], "--box: 1,5,9,61 reaches beyond"),
    "threshold": (["IMAGE", "RUN", "--text", "star", "--threshold", "1.5"], "--threshold: 1.5"),
    "geometry": (["IMAGE", "RUN", "--text", "star", "--geometry", "round"], "unknown geometry 'round'"),
    "no suffix": (["IMAGE", "RUN", "--text", "star", "--out", "seen"], "--out: seen does not end in .png"),
    "no folder": (["IMAGE", "RUN", "--text", "star", "--out", "MISSING/a.png"], "--out: there is no folder"),
    "no model": (["IMAGE", "MISSING", "--text", "star"], "no such file or folder"),
    "another model": (["IMAGE", "TRACKER", "--text", "star"], "no detector of concepts"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_named_in_one_line(
    case: str, capsys: pytest.CaptureFixture[str], run: Path, image: Path, world: Path, tmp_path: Path
) -> None:
    arguments, complaint = ERRORS[case]
    places = {"MISSING": tmp_path / "nowhere", "RUN": run, "IMAGE": image, "JSON": world / "concepts_val.json",
              "TRACKER": Path(samdistill.__path__[0]) / "sandbox" / "weights" / "tracker"}  # fmt: skip
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    assert complaint in refused(capsys, "predict", *arguments)


def test_evaluate_asks_in_words_and_its_predictions_score_alike(
    capsys: pytest.CaptureFixture[str], run: Path, world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "predictions.json"
    common = ("evaluate", "--concepts", "--threshold", "0.01", "--json")
    first = json.loads(ask(capsys, *common, run, world, "--teacher", run / "student", "--out", out))
    assert first["questions"] == len(ConceptSet.load(world / "concepts_val.json").pairs) and first["images"] == 3
    teacher, student = first["models"]
    assert student["name"] == "student" and student["parameters"] == teacher["parameters"] > 1e5
    assert all(student[field] == teacher[field] for field in ("cgf1", "pmf1", "il_mcc", "f1_50", "mask_ap"))
    assert all(len(found) == 5 for found in load_predictions(out).values())  # all queries, not those kept alone
    again = json.loads(ask(capsys, *common, out, world / "concepts_val.json", "--teacher", out))
    for row in again["models"]:
        assert row["parameters"] is None and row["latency_ms"] is None
        assert all(row[field] == student[field] for field in ("cgf1", "pmf1", "il_mcc", "f1_50", "mask_ap"))
    assert again["questions"] == first["questions"] and again["threshold"] == 0.01
    table = ask(capsys, "evaluate", run, world, "--concepts", "--images", "1")
    assert "cgF1" in table and "latency per question" in table and "about 1 image," in " ".join(table.split())


def test_a_file_without_predictions_scores_nothing(
    capsys: pytest.CaptureFixture[str], world: Path, tmp_path: Path
) -> None:
    (tmp_path / "none.json").write_text("[]")
    (row,) = json.loads(ask(capsys, "evaluate", tmp_path / "none.json", world, "--concepts", "--json"))["models"]
    assert [row[field] for field in ("cgf1", "pmf1", "il_mcc", "f1_50", "f1_75", "mask_ap")] == [0] * 6


def test_files_of_several_annotators_and_of_boxes(
    capsys: pytest.CaptureFixture[str], world: Path, tmp_path: Path
) -> None:
    """Predictions that are the objects of one file, which is given second; the first has none."""
    record = json.loads((world / "concepts_val.json").read_text())
    answers = [{**a, "score": 0.9} for a in record["annotations"]]
    (tmp_path / "found.json").write_text(json.dumps(answers))
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(record | {"annotations": []}))
    common = ("evaluate", tmp_path / "found.json", "--concepts", "--json")
    alone = json.loads(ask(capsys, *common, empty))["models"][0]
    assert alone["cgf1"] == 0 and alone["mask_ap"] is None
    several = json.loads(ask(capsys, *common, empty, world / "concepts_val.json"))
    assert several["annotators"] == 2 and several["models"][0]["cgf1"] == pytest.approx(1, abs=1e-3)
    assert several["models"][0]["mask_ap"] is None  # of which annotator would it be?
    boxes = json.loads(ask(capsys, *common, world / "concepts_val.json", "--iou", "boxes"))
    assert boxes["iou"] == "boxes" and boxes["figures"]["student"]["cgf1"] == pytest.approx(1, abs=1e-3)
    result = samdistill.evaluate_concepts(tmp_path / "found.json", [empty, world], progress=False)
    assert result.to_dict()["figures"] == several["figures"] and "best of 2 annotators" in result.caption()


def test_evaluate_refuses_what_does_not_go_together(
    capsys: pytest.CaptureFixture[str], run: Path, world: Path, tmp_path: Path
) -> None:
    predictions = tmp_path / "predictions.json"
    predictions.write_text("[]")
    words = ("evaluate", run, world, "--concepts")
    assert "go with --concepts" in refused(capsys, *words[:3], "--out", predictions)
    assert "go with --concepts" in refused(capsys, *words[:3], "--threshold", "0.4")
    assert "go with --concepts" in refused(capsys, *words[:3], "--iou", "masks")
    assert "--prompts does not go" in refused(capsys, *words, "--prompts", "box")
    assert "no concept annotations" in refused(capsys, "evaluate", run, tmp_path, "--concepts")
    assert "--threshold: 2" in refused(capsys, *words, "--threshold", "2")
    assert "--out: " in refused(capsys, *words, "--out", tmp_path / "nowhere" / "a.json")
    assert "--teacher must be a file too" in refused(capsys, *words, "--teacher", predictions)
    assert "--teacher must be a file too" in refused(
        capsys, "evaluate", predictions, world, "--concepts", "--out", predictions
    )
    assert "--images must be at least 1, got 0" in refused(capsys, *words, "--images", "0")
    assert "--iou boxes needs a file of predictions" in refused(capsys, *words, "--iou", "boxes")
    assert "given twice; give one file per annotator" in refused(capsys, *words[:3], world, "--concepts")
    assert "several files of data go with --concepts" in refused(capsys, *words[:3], world)
    assert "unknown geometry" in refused(capsys, *words, "--geometry", "round")
