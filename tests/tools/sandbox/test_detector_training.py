"""Training the sandbox's detector: two small steps, a folder that answers, and questions that follow from the batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, Sam3Model

import detector_training
from detector_calibration import calibrate
from detector_objective import WEIGHTS
from detector_questions import Questions, draw_questions
from detector_training import (
    DetectorTask,
    held_out_concepts,
    load_detector,
    score_answers,
    train_detector,
)
from prompt_training import TrainedTeacher
from samdistill.engine.state import Checkpoint
from samdistill.inference.concepts import ask_image, load_concept_model
from samdistill.sandbox.scenes import Scenes, render_scenes
from samdistill.types import VISUAL, DetectorOutput, UserError
from tracker_model import HELD_OUT_SEED, IMAGE_SIZE

SHORT = {
    "EPOCH_STEPS": 1, "NAMING_EPOCHS": 1, "PER_SCENE": 2, "VALIDATION_SCENES": 2, "FINAL_SCENES": 3,
    "calibrate": partial(calibrate, scenes=4),
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHORT.items():
        monkeypatch.setattr(detector_training, name, value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedTeacher:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setattr(detector_training, name, value)
        return train_detector(tmp_path_factory.mktemp("detector"), 2, 2, 5e-4, None)


@pytest.fixture(scope="module")
def model(trained: TrainedTeacher) -> Sam3Model:
    return load_detector(trained.folder).eval()


def test_it_writes_the_average_as_a_float16_folder_that_answers(trained: TrainedTeacher) -> None:
    assert trained.steps == 2
    assert set(trained.figures) == {"cgf1", "pmf1", "il_mcc", "f1_50", "box_pmf1"}
    weights = load_file(trained.folder / "model.safetensors")
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float16}
    saved = Checkpoint.load(trained.folder.parent / "ckpt_epoch_2.pt")
    assert saved.ema is not None and not any(name.startswith("naming") for name in weights)
    for name, tensor in weights.items():
        own = saved.ema[f"model.{name}"]
        if "query_proj" in name or "presence_head.layer3" in name:  # calibrated: a factor of the whole tensor
            own = own * (tensor.float().norm() / own.norm().clamp(min=1e-12))
        torch.testing.assert_close(tensor.float(), own, atol=1e-3, rtol=2e-3)
    tokens = AutoTokenizer.from_pretrained(trained.folder)("red star", return_tensors="pt")
    plain = Sam3Model.from_pretrained(trained.folder, dtype=torch.float32)
    assert plain(pixel_values=torch.zeros(1, 3, 126, 126), **tokens).pred_masks.shape == (1, 25, 36, 36)


def test_the_package_reads_it_as_a_detector(trained: TrainedTeacher) -> None:
    detector = load_concept_model(trained.folder)
    picture = Image.fromarray(render_scenes([0], IMAGE_SIZE, HELD_OUT_SEED).images[0].permute(1, 2, 0).numpy())
    found = ask_image(detector, picture, text="red star", threshold=0.0)
    assert found.masks.shape == (25, IMAGE_SIZE, IMAGE_SIZE)


def test_it_can_be_trained_further(trained: TrainedTeacher) -> None:
    task = DetectorTask(2, trained.folder)
    student, kept = task.build_student(), load_file(trained.folder / "model.safetensors")
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert all(torch.equal(student.model.state_dict()[name], tensor.float()) for name, tensor in kept.items())
    assert task.to([0, 1], CPU).questions is not None and DetectorTask(2).to([0, 1], CPU).questions is None


def test_training_further_changes_the_heads_and_keeps_the_features(trained: TrainedTeacher, tmp_path: Path) -> None:
    before = load_file(trained.folder / "model.safetensors")
    after = load_file(train_detector(tmp_path, 2, 2, 1e-3, trained.folder).folder / "model.safetensors")
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    vision = {name for name in before if name.startswith("vision_encoder.")}
    assert vision <= same and "geometry_encoder.cls_embed.weight" not in same


def test_other_models_and_other_words_are_refused(
    trained: TrainedTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="answers no questions in words"):
        load_detector("sandbox-sam")
    words = tmp_path / "words"
    words.mkdir()
    for path in trained.folder.iterdir():
        (words / path.name).write_bytes(path.read_bytes())
    text = (words / "tokenizer.json").read_text()
    (words / "tokenizer.json").write_text(text.replace('"red"', '"crimson"'))
    with pytest.raises(UserError, match="no detector of the sandbox"):
        load_detector(words)
    monkeypatch.setattr("detector_model.FFN", 128)
    with pytest.raises(UserError, match="no detector of the sandbox"):
        load_detector(trained.folder)


def test_a_lesson_follows_from_its_scenes_and_never_mixes_boxes_with_words() -> None:
    task, kinds = DetectorTask(2), set()
    first, again, other = (task.to(batch, CPU) for batch in ([10, 11], [10, 11], [12, 13]))
    assert first.questions is not None and again.questions is not None and other.questions is not None
    assert first.questions.prompts.texts == again.questions.prompts.texts and first.masks == again.masks
    assert torch.equal(first.scenes.images, again.scenes.images)
    assert not torch.equal(first.scenes.images, other.scenes.images)
    for start in range(10, 90, 2):
        lesson = task.to([start, start + 1], CPU)
        assert lesson.questions is not None
        shown = set((lesson.questions.prompts.labels == 1).flatten().tolist())
        assert len(shown) == 1
        kinds.add((shown.pop(), lesson.masks))
    assert len(kinds) == 4  # words and boxes, each with masks and without


def test_terms_are_named_alike_in_every_step() -> None:
    task = DetectorTask(2)
    student = task.build_student()
    assert all(list(task.terms(student, task.to(batch, CPU))) == list(WEIGHTS) for batch in ([0, 1], [2, 3]))


def oracle(scenes: Scenes, questions: Questions, answered: torch.Tensor) -> DetectorOutput:
    """Exact masks of every object that answers a question, detected where ``answered``."""
    rows, slots = questions.slots.nonzero(as_tuple=True)
    count, image = questions.slots.shape[0], questions.prompts.image
    masks, logits = torch.full((count, 5, IMAGE_SIZE, IMAGE_SIZE), -9.0), torch.full((count, 5), -9.0)
    masks[rows, slots] = scenes.masks[image[rows], slots].float() * 18 - 9
    logits[rows, slots] = 9.0
    presence, none = answered[:, None].float() * 18 - 9, torch.zeros(0)
    return DetectorOutput(masks, torch.zeros(count, 5, 4), logits, presence, none, (), none)


def test_right_detections_score_one_however_the_scenes_are_divided(
    model: Sam3Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[tuple[str, ...]] = []

    def answers(_: Sam3Model, scenes: Scenes, questions: Questions) -> DetectorOutput:
        texts.append(questions.prompts.texts)
        return oracle(scenes, questions, questions.slots.any(1))

    monkeypatch.setattr(detector_training, "ask_scenes", answers)
    monkeypatch.setattr(detector_training, "PER_SCENE", 5)
    asked = []
    for at_once in (4, 7):
        monkeypatch.setattr(detector_training, "VALIDATION_SCENES", at_once)
        texts.clear()
        figures = held_out_concepts(model, 12)
        names = ("cgf1", "pmf1", "il_mcc", "f1_50", "box_pmf1")
        assert figures == pytest.approx(dict.fromkeys(names, 1.0), abs=1e-4)  # small terms in the denominators
        asked.append(([t for own in texts[::2] for t in own], [t for own in texts[1::2] for t in own]))
    words, boxes = asked[0]
    assert asked[0] == asked[1] and len(words) == 60 and VISUAL not in words and set(boxes) == {VISUAL}


def test_objects_that_are_missed_cost(model: Sam3Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = render_scenes(range(8), IMAGE_SIZE, HELD_OUT_SEED)
    questions = draw_questions(scenes, 5, np.random.default_rng(0), boxes=False)
    seen = questions.slots.any(1) & (torch.arange(40) % 2 == 0)
    monkeypatch.setattr(detector_training, "ask_scenes", lambda *_: oracle(scenes, questions, seen))
    found = score_answers(model, scenes, questions).summary()
    assert found["precision_50"] == pytest.approx(1, abs=1e-5) and found["il_fp"] == 0 and found["il_tp"] == seen.sum()
    assert found["recall_50"] == pytest.approx((questions.slots[seen].sum() / questions.slots.sum()).item(), abs=1e-5)
