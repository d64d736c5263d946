"""What the sandbox's teacher is trained on: terms that are finite, attached, and go down."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import prompt_objective
from prompt_objective import prompt_terms, teacher_terms
from samdistill.sandbox.scenes import render_scenes
from samdistill.types import Prompts
from tracker_model import IMAGE_SIZE, TRAIN_SEED, build_teacher

NAMES = [f"{kind}/{part}" for kind in ("box", "point") for part in ("bce", "dice", "iou")]


@pytest.fixture(scope="module")
def model():
    return build_teacher(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_term_of_a_step_is_finite_and_reaches_the_model(model) -> None:
    terms = teacher_terms(model, render_scenes(range(3), IMAGE_SIZE, TRAIN_SEED), generator(), prompts_per_image=2)
    assert sorted(terms) == sorted([*NAMES, "refine/bce", "refine/dice", "refine/iou"])
    assert terms.nonfinite() == []
    trunk = [p for p in model.vision_encoder.backbone.parameters() if p.requires_grad]
    for name, term in terms.items():
        gradients = torch.autograd.grad(term.value, trunk, retain_graph=True, allow_unused=True)
        assert any(g is not None and bool(g.abs().max() > 0) for g in gradients), name


def test_a_scene_without_objects_gives_zeros_not_nans(model) -> None:
    scenes = render_scenes(range(2), IMAGE_SIZE, TRAIN_SEED)
    empty = dataclasses.replace(scenes, masks=torch.zeros_like(scenes.masks), valid=torch.zeros_like(scenes.valid))
    terms = teacher_terms(model, empty, generator())
    assert terms.nonfinite() == []
    assert all(term.value.item() == 0 for term in terms.values())


def test_prompts_lie_on_their_objects(model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Prompts] = []
    predict = prompt_objective.predict

    def spy(model: object, embeddings: object, prompts: Prompts, multimask: bool = False) -> object:
        asked.append(prompts)
        assert not multimask  # the tracker's tokens for unclear prompts are not trained
        return predict(model, embeddings, prompts, multimask)

    monkeypatch.setattr(prompt_objective, "predict", spy)
    scenes = render_scenes(range(4), IMAGE_SIZE, TRAIN_SEED)
    teacher_terms(model, scenes, generator(5), prompts_per_image=3)
    box, point, refine = asked
    any_object = (scenes.masks & scenes.valid[..., None, None]).any(1)
    assert point.points is not None and box.boxes is not None
    for image, points in enumerate(point.points[:, :, 0].long()):
        assert all(bool(any_object[image, y, x]) for x, y in points.tolist())
    assert bool((box.boxes[..., 2:] > box.boxes[..., :2]).all())
    assert bool(((box.boxes >= 0) & (box.boxes <= IMAGE_SIZE)).all())
    assert refine.points is not None and refine.points.shape == (4, 1, 2, 2) and refine.masks is not None


def test_the_generator_decides_the_prompts(model) -> None:
    scenes = render_scenes(range(2), IMAGE_SIZE, TRAIN_SEED)
    values = [teacher_terms(model, scenes, generator(seed)).total.item() for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_the_warm_up_teaches_the_decoder_its_prompts() -> None:
    model, draws = build_teacher(0), generator(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def total() -> float:
        with torch.no_grad():
            terms = prompt_terms(model, generator(99), 8, 3)
        assert list(terms) == NAMES and terms.nonfinite() == []
        return terms.total.item()

    before = total()
    for _ in range(25):
        prompt_terms(model, draws, 4, 3).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert total() < 0.85 * before
