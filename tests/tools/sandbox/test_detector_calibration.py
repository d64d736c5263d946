"""Calibration against scores that were made unsure on purpose."""

import copy

import numpy as np
import pytest
import torch

import detector_calibration
from detector_answers import ask_scenes
from detector_calibration import Factors, calibrate
from detector_model import build_detector_teacher
from detector_questions import draw_questions
from samdistill.ops.masks import masks_to_boxes
from samdistill.sandbox.scenes import render_scenes
from samdistill.types import DetectorOutput


def told(scenes, questions, scale: float) -> DetectorOutput:
    """An oracle that is right in nine of ten queries and questions, and surer or less sure by ``scale``."""
    boxes = (masks_to_boxes(scenes.masks) / 126)[questions.prompts.image]
    generator = torch.Generator().manual_seed(0)

    def noisy(truth: torch.Tensor) -> torch.Tensor:
        wrong = torch.rand(truth.shape, generator=generator) < 0.1
        return torch.where(truth ^ wrong, 1.0, -1.0) * torch.logit(torch.tensor(0.9)) / scale

    empty = torch.zeros(0)
    return DetectorOutput(
        empty, boxes, noisy(questions.slots), noisy(questions.slots.any(1, keepdim=True)), empty, (), empty
    )


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_factor_undoes_how_unsure_an_oracle_was_made(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nine of ten are right, the cross-entropy is least at a probability of nine tenths."""
    monkeypatch.setattr(detector_calibration, "ask_scenes", lambda _, scenes, questions: told(scenes, questions, scale))
    found = calibrate(build_detector_teacher().eval(), scenes=64)
    assert found.presence == pytest.approx(scale, rel=0.25)
    assert found.query == pytest.approx(scale, rel=0.25)


def test_logits_are_multiplied_and_nothing_else_changes(near) -> None:
    model = build_detector_teacher().eval()
    before = copy.deepcopy(model)
    factors = calibrate(model, scenes=4)
    assert isinstance(factors, Factors)
    scenes = render_scenes(range(2), 126, 5)
    questions = draw_questions(scenes, 2, np.random.default_rng(0), boxes=False)
    with torch.no_grad():
        plain, scaled = ask_scenes(before, scenes, questions), ask_scenes(model, scenes, questions)
    torch.testing.assert_close(scaled.pred_logits, plain.pred_logits * factors.query, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scaled.presence_logits, plain.presence_logits * factors.presence, rtol=1e-3, atol=1e-4)
    for name in ("pred_masks", "pred_boxes", "semantic_seg", "encoder"):
        near(getattr(scaled, name), getattr(plain, name))
