"""What int8 loses on held-out data: halves of the calibration data, the limit, and the record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from parts_toy import eager_target, toy_part
from tiny_students import tiny_detector

from samdistill.checkpoints.promptable import load_promptable
from samdistill.cli import main
from samdistill.data.saco import to_rle
from samdistill.data.saco_predictions import PredictedInstance
from samdistill.deployment import folder as module
from samdistill.deployment import part_files, quality
from samdistill.deployment.gate import LIMITS
from samdistill.deployment.quality import Calibration, calibration
from samdistill.deployment.targets import TARGETS
from samdistill.errors import UserError
from samdistill.sandbox.write import write_coco, write_concept_set

LABELS = {"measured": False, "reason": "the calibration data have no labels for this model"}


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch):
    """Function that makes int8 lose a given mIoU, or that gives data without labels for None."""
    part = toy_part()
    made = eager_target(part.module)
    made.precisions = ("fp32", "int8")
    monkeypatch.setattr(module, "parts_of", lambda *_: [part])
    monkeypatch.setattr(part_files, "limits_of", lambda *_: LIMITS["fp32"])
    monkeypatch.setattr(part_files, "LIMITS", dict.fromkeys(LIMITS, LIMITS["fp32"]))
    made.reduce = staticmethod(lambda part, source, path, *_: shutil.copyfile(source, path))
    TARGETS.names()  # registers the real ones before one is replaced
    for name in ("onnx", "toy"):
        monkeypatch.setitem(TARGETS._entries, name, made)

    def use(loss: float | None) -> None:
        measure = None if loss is None else lambda folder: {"figures": {"mIoU box": {"model": 0.7, "file": 0.7 - loss}}}
        pixels = torch.zeros(1, 3, 8, 8)
        monkeypatch.setattr(module, "calibration", lambda *_: Calibration(pixels, pixels, measure))

    return use


COMMAND = ["export", "sandbox-mobile", "--to", "onnx", "--precision", "fp32", "int8", "--calibrate", "photos", "--out"]


@pytest.mark.parametrize("loss", [None, 0.005])
def test_the_record_says_what_was_lost_or_that_it_was_not_measured(
    lost, loss: float | None, tmp_path: Path, capsys
) -> None:
    lost(loss)
    assert main([*COMMAND, str(tmp_path / "out")]) == 0
    said = "int8 on held-out data: mIoU box 0.700 -> 0.695"
    assert (said in capsys.readouterr().out) == (loss is not None)
    found = json.loads((tmp_path / "out" / "export.json").read_text())["quality"]["int8"]
    assert found == LABELS if loss is None else found["measured"] and found["lost"] == pytest.approx(0.005)


def test_it_is_measured_with_the_files_that_load_opens(lost, tmp_path: Path) -> None:
    lost(0.02)
    assert main([one if one != "onnx" else "toy" for one in COMMAND] + [str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "export.json").read_text())["quality"]["int8"]
    assert found == {"measured": False, "reason": "it is measured with the files of the target onnx"}


def test_too_large_a_loss_is_refused_or_named(lost, tmp_path: Path, capsys) -> None:
    lost(0.02)
    assert main([*COMMAND, str(tmp_path / "out")]) == 2
    assert "int8 loses 0.020 of mIoU box on held-out data, over 0.01" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*COMMAND, str(tmp_path / "out"), "--keep-failed"]) == 1
    rows = json.loads((tmp_path / "out" / "export.json").read_text())["files"]
    assert {row["path"]: row["passed"] for row in rows} == {
        "onnx/toy.json": True,
        "onnx/toy_quantized.failed.json": False,
    }
    assert {path.name for path in (tmp_path / "out" / "onnx").iterdir()} == {"toy.json", "toy_quantized.failed.json"}


def test_one_half_calibrates_and_the_other_measures(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = load_promptable("sandbox-mobile"), []
    monkeypatch.setattr(quality, "open_promptable", lambda folder, precision: (model, 126))
    real = quality.evaluate_models

    def seen(models, source, *given, **options):
        asked.append(source)
        return real(models, source, *given, **options)

    monkeypatch.setattr(quality, "evaluate_models", seen)
    found = calibration(model, world)
    said = found.quality(world)
    keys = quality.held_out_images(world).keys
    assert asked[0].keys == keys[1::2] and len(found.pixels) == len(keys[::2])
    assert found.agrees and min(said["agreement"].values()) == 1 and quality.shortfall(said) is None
    assert quality.shortfall(said | {"agreement": {"box": 0.9}}).startswith("the masks of boxes on held-out data agree")
    assert said["measured"] and said["lost"] == 0 and set(said["figures"]) >= {"mIoU box", "mIoU point"}


def test_questions_measure_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path, 4, 64, 3, "val")
    write_concept_set(tmp_path, 4, 64, 3)
    student = tiny_detector()
    monkeypatch.setattr(quality, "open_detector", lambda folder, precision: (student, 64))
    found = calibration(student, tmp_path)
    said = found.quality(tmp_path)
    assert found.pixels.shape == (2, 3, 64, 64) and said["measured"] and set(said["figures"]) == {"cgF1"}
    assert said["agreement"] == {"words": 1.0}


def test_two_detectors_agree_by_the_union_of_what_they_find() -> None:
    """Four questions on an image of 4 x 4 pixels, by hand."""

    def found(*columns: tuple[float, list[int]]) -> list[PredictedInstance]:
        rows = []
        for score, some in columns:
            mask = np.zeros((4, 4), bool)
            mask[:, some] = True
            rows.append(PredictedInstance(score, to_rle(mask)))
        return rows

    first = {1: found((0.9, [0]), (0.6, [1]), (0.4, [3])), 2: found((0.3, [0])), 3: found((0.8, [0])), 4: []}
    second = {1: found((0.7, [1, 2])), 2: [], 3: found((0.4, [0])), 4: found((0.9, []))}
    # 1: columns 0 and 1 against 1 and 2; 2: nothing and nothing; 3: a mask and nothing; 4: nothing and an empty mask
    assert quality.union_iou(first, second) == pytest.approx((1 / 3 + 0) / 2)
    assert quality.union_iou(first, second, 0.35) == pytest.approx((1 / 4 + 1) / 2)
    assert quality.union_iou({1: []}, {1: []}) == 1 == quality.union_iou(first, first)


def test_images_alone_measure_nothing(world: Path) -> None:
    image = next(path for path in sorted(world.rglob("*")) if path.suffix in (".png", ".jpg"))
    found = calibration(load_promptable("sandbox-mobile"), image)
    assert found.quality(world) == LABELS and torch.equal(found.pixels, found.held_out)


def test_no_images_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        calibration(load_promptable("sandbox-mobile"), tmp_path)
