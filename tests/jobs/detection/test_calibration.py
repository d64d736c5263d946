"""Calibrated scores: the saved student is the trained one, its logits scaled to the teacher's decisions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_detection import Recipe

from samdistill.data.questions import collate_questions
from samdistill.engine import Checkpoint
from samdistill.inference.concepts import load_concept_model
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.detection.task import DetectionTask
from samdistill.pipeline import train
from samdistill.types import DetectorOutput, UserError

FACTORS = np.geomspace(0.125, 8, 2001)


def best(logits: torch.Tensor, yes: torch.Tensor) -> float:
    """By trying 2001 factors."""
    signed = torch.where(yes, -1, 1).flatten().numpy() * logits.double().flatten().numpy()
    return float(FACTORS[np.logaddexp(0, FACTORS[:, None] * signed).mean(1).argmin()])


def answers(config: DetectionRunConfig, images: int) -> tuple[DetectionTask, DetectorOutput, DetectorOutput]:
    """The task, and what the trained student of the last checkpoint and the teacher answer about held-out images."""
    task = DetectionParts(config).task()
    student, held_out = task.build_student(), task.held_out
    assert held_out is not None
    student.load_state_dict(Checkpoint.load(sorted(config.output.glob("ckpt_epoch_*.pt"))[-1]).model, strict=False)
    batch, prompts, _ = collate_questions([held_out[index] for index in range(images)])
    return (
        task,
        task.kind.detector(student.eval(), task.words).answer(batch, prompts),
        task.teacher.answer(batch, prompts),
    )


@pytest.mark.parametrize("kind", ["hosted", "detection"])
def test_the_saved_students_logits_have_the_best_factors(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recipe: Recipe = request.getfixturevalue(kind)
    own = ("match.method=index",) if kind == "hosted" else ("student.queries=10",)  # in the teacher's number
    config = recipe(tmp_path, "train.batch_size=8", "calibration.images=3", "questions.per_image=3", *own)
    train(config)
    task, plain, teacher = answers(config, 3)
    saved = json.loads((tmp_path / "student" / "config.json").read_text())["score_factors"]
    yes = teacher.presence_logits.sigmoid() > 0.5
    assert saved["presence"] == pytest.approx(best(plain.presence_logits, yes), rel=5e-3)
    if kind == "hosted":
        assert saved["query"] == pytest.approx(best(plain.pred_logits, teacher.pred_logits > 0), rel=5e-3)
    assert (saved["query"], saved["presence"]) != (1, 1)
    batch, prompts, _ = collate_questions([task.held_out[index] for index in range(3)])
    found = load_concept_model(tmp_path).answer(batch, prompts)
    torch.testing.assert_close(
        found.pred_logits, (saved["query"] * plain.pred_logits).clamp(-12, 12), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        found.presence_logits, (saved["presence"] * plain.presence_logits).clamp(-10, 10), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(found.pred_boxes, plain.pred_boxes, rtol=1e-3, atol=1e-4)
    before = (tmp_path / "student" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "student")
    train(config)  # goes on after the last step
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == before


def test_phrases_of_training_images_alone_cannot_calibrate(detection: Recipe, scenes: Path, tmp_path: Path) -> None:
    keys = [path.stem for path in sorted((scenes / "images" / "train").iterdir())]
    listed = tmp_path / "phrases.jsonl"
    listed.write_text("".join(json.dumps({"key": key, "phrases": ["star"]}) + "\n" for key in keys))
    config = detection(
        tmp_path / "run", "questions.source=jsonl", f"questions.file={listed}", "calibration.images=3",
        "questions.negatives=0",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"calibration\.images: questions\.file has no phrase of a held-out image"):
        DetectionParts(config).task()
