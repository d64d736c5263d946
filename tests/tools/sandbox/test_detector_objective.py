"""The loss of the sandbox's detector: right answers cost nothing, pairs are the cheapest, everything learns."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou

from detector_model import build_detector_teacher
from detector_objective import (
    WEIGHTS,
    Answer,
    ConceptLearner,
    Lesson,
    answer,
    assign,
    concept_terms,
    detector_terms,
    naming_loss,
)
from detector_questions import Questions, draw_questions
from samdistill.ops.images import normalise
from samdistill.ops.masks import masks_to_boxes
from samdistill.sandbox.concepts import sandbox_words
from samdistill.sandbox.scenes import COLOURS, SHAPES, Scenes, render_scenes
from samdistill.types import ConceptPrompts
from tracker_model import IMAGE_SIZE, TRAIN_SEED

QUERIES = 25
DEAD = {
    "vision_encoder.neck.fpn_layers.3.proj1.weight", "vision_encoder.neck.fpn_layers.3.proj1.bias",
    "vision_encoder.neck.fpn_layers.3.proj2.weight", "vision_encoder.neck.fpn_layers.3.proj2.bias",
    "text_encoder.text_projection.weight",
}  # fmt: skip
"""SAM 3 has them and reads none: its coarsest level, and the projection of CLIP's pooled text."""


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return render_scenes(range(3), IMAGE_SIZE, TRAIN_SEED)


@pytest.fixture(scope="module")
def learner() -> ConceptLearner:
    return ConceptLearner(build_detector_teacher(0), sandbox_words())


def drawn(scenes: Scenes, boxes: bool = False, seed: int = 0) -> Questions:
    return draw_questions(scenes, 4, np.random.default_rng(seed), boxes)


def perfect(scenes: Scenes, questions: Questions, layers: int = 2, sure: float = 20.0) -> Answer:
    """Query 3 + slot answers for that slot, with its box and its mask."""
    rows, slots = questions.slots.nonzero(as_tuple=True)
    image, count = questions.prompts.image, len(questions.slots)
    truth = masks_to_boxes(scenes.masks) / IMAGE_SIZE
    logits, boxes = torch.full((layers, count, QUERIES), -sure), torch.full((layers, count, QUERIES, 4), 0.5)
    masks = torch.full((count, QUERIES, IMAGE_SIZE, IMAGE_SIZE), -sure)
    logits[:, rows, 3 + slots] = sure
    edges = truth[image[rows], slots]
    boxes[:, rows, 3 + slots] = torch.cat([(edges[:, :2] + edges[:, 2:]) / 2, edges[:, 2:] - edges[:, :2]], 1)
    masks[rows, 3 + slots] = (scenes.masks[image[rows], slots].float() * 2 - 1) * sure
    presence = (questions.slots.any(1).float() * 2 - 1).expand(layers, -1) * sure
    return Answer(logits, torch.logit(boxes), presence, masks, masks.amax(1, keepdim=True))


def test_right_answers_cost_nothing_and_each_fault_its_own_term(scenes: Scenes) -> None:
    questions = drawn(scenes)
    assert questions.slots.any(1).any() and not questions.slots.any(1).all()
    right = perfect(scenes, questions)
    values = concept_terms(right, scenes, questions, masks=True)
    assert set(values) == set(WEIGHTS) - {"naming"}
    assert all(abs(value.item()) < 1e-5 for value in values.values()), values
    faults = {
        "logit": Answer(-right.logits, right.boxes, right.presence, right.masks, right.semantic),
        "l1": Answer(right.logits, right.boxes + 0.3, right.presence, right.masks, right.semantic),
        "presence": Answer(right.logits, right.boxes, -right.presence, right.masks, right.semantic),
        "mask_dice": Answer(right.logits, right.boxes, right.presence, -right.masks, right.semantic),
        "semantic_bce": Answer(right.logits, right.boxes, right.presence, right.masks, -right.semantic),
    }
    for name, wrong in faults.items():
        assert concept_terms(wrong, scenes, questions, masks=True)[name] > 0.05, name
    assert set(concept_terms(right, scenes, questions, masks=False)) == {"logit", "l1", "giou", "presence"}


def test_terms_of_pairs_by_hand() -> None:
    """One scene, one object on the left half, one query a step to the right of it; then the same, asked in vain."""
    masks = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    masks[..., :4] = True
    scenes = Scenes(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), masks, torch.ones(1, 1).bool(), [[("star", "red")]])
    box = torch.logit(torch.tensor([0.375, 0.5, 0.5, 1 - 1e-6])).view(1, 1, 1, 4)  # xyxy 0.125, 0, 0.625, 1
    found = Answer(torch.zeros(1, 1, 1), box, torch.zeros(1, 1), torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    asked = Questions(ConceptPrompts.words(["star"], [0]), torch.ones(1, 1).bool())
    values = concept_terms(found, scenes, asked, masks=True)
    ln2 = math.log(2)
    expected = {
        "logit": 0.6 * 0.25 * ln2, "l1": 0.25, "giou": 1 - 0.375 / 0.625, "presence": ln2, "mask_bce": ln2,
        "mask_dice": 1 - (32 + 1) / (32 + 32 + 1), "semantic_bce": ln2, "semantic_dice": 1 - (32 + 1) / (32 + 32 + 1),
    }  # fmt: skip
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, abs=1e-4)
    vain = Questions(asked.prompts, torch.zeros(1, 1).bool())
    values = concept_terms(found, scenes, vain, masks=True)
    nothing = {"l1": 0, "giou": 0, "mask_bce": 0, "mask_dice": 0, "semantic_dice": 0}
    expected = {"logit": 0.5 * 0.4 * 0.25 * ln2, "presence": ln2, "semantic_bce": ln2, **nothing}
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, abs=1e-4)


def test_pairs_are_the_cheapest_of_all_assignments() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 9, 2, 2, generator=generator).sort(2).values.flatten(2)
    boxes, truth = corners[:, :5], corners[:, 5:]
    logits = torch.randn(2, 5, generator=generator)
    slots = torch.tensor([[True, False, True, True], [False, True, False, False]])
    rows, queries, targets = assign(logits, boxes, truth, slots).pairs
    assert sorted(zip(rows.tolist(), targets.tolist(), strict=True)) == [(0, 0), (0, 2), (0, 3), (1, 1)]

    def cost(row: int, query: int, slot: int) -> float:
        first, second = boxes[row, query], truth[row, slot]
        overlap = generalized_box_iou(first[None], second[None]).item()
        return 5 * (first - second).abs().sum().item() - 2 * overlap - 2 * logits[row, query].sigmoid().item()

    for row in range(2):
        wanted = slots[row].nonzero()[:, 0].tolist()
        best = min(
            sum(cost(row, q, s) for q, s in zip(chosen, wanted, strict=True))
            for chosen in itertools.permutations(range(5), len(wanted))
        )
        mine = rows == row
        total = sum(cost(row, q, s) for q, s in zip(queries[mine].tolist(), targets[mine].tolist(), strict=True))
        assert total == pytest.approx(best, abs=1e-5)


def test_a_cell_is_named_after_what_lies_at_its_centre() -> None:
    """Two cells: the left one shows a red star, the right one background."""
    masks = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
    masks[0, 1, :, :2] = True
    names = [[("circle", "blue"), ("star", "red")]]
    scenes = Scenes(torch.zeros(1, 3, 2, 4, dtype=torch.uint8), masks, torch.ones(1, 2).bool(), names)
    logits = torch.zeros(1, 11 + 13, 1, 2)
    logits[0, 1 + SHAPES.index("star"), 0, 0] = 2.0
    logits[0, 11, 0, 1] = 3.0  # the colours' background
    shape = -(2 - math.log(math.exp(2) + 10)) + math.log(11)
    colour = math.log(13) - (3 - math.log(math.exp(3) + 12))
    assert naming_loss([logits], scenes).item() == pytest.approx((shape / 2 + colour / 2) / 2, abs=1e-5)
    assert naming_loss([logits, torch.zeros_like(logits)], scenes).item() == pytest.approx(
        ((shape + colour) / 4 + (math.log(11) + math.log(13)) / 2) / 2, abs=1e-5
    )
    assert 1 + len(SHAPES) == 11 and 1 + len(COLOURS) == 13


def test_the_answer_is_transformers_own_of_every_question_apart(learner: ConceptLearner, scenes: Scenes) -> None:
    model = learner.model
    for boxes in (False, True):
        asked = drawn(scenes, boxes).prompts
        with torch.no_grad():
            vision = model.get_vision_features(normalise(scenes.images))
            found = answer(model, vision, learner.words, asked)
            own = model(pixel_values=normalise(scenes.images)[asked.image], **learner.words.inputs(asked, "cpu"))
        assert found.logits.shape == (3, 12, QUERIES) and found.presence.shape == (3, 12)
        torch.testing.assert_close(found.logits[-1], own.pred_logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.presence[-1, :, None], own.presence_logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.masks, own.pred_masks, atol=1e-3, rtol=1e-3)
        centre, half = found.boxes[-1].sigmoid().split(2, -1)
        torch.testing.assert_close(torch.cat([centre - half / 2, centre + half / 2], -1), own.pred_boxes)


def test_every_weight_learns_but_those_that_sam_3_never_reads(learner: ConceptLearner, scenes: Scenes) -> None:
    for head in (learner.model.detr_decoder.box_head, learner.model.detr_decoder.presence_head):
        torch.nn.init.normal_(head.layer3.weight, std=0.02)  # they start at zero, which stops the layers before
    learner.zero_grad()
    for boxes in (False, True):
        terms = detector_terms(learner, Lesson(scenes, drawn(scenes, boxes), masks=True))
        assert list(terms) == list(WEIGHTS) and terms.nonfinite() == []
        assert all(term.value > 0 for term in terms.values())
        terms.total.backward()
    silent = {
        name.removeprefix("model.")
        for name, p in learner.named_parameters()
        if p.grad is None or not bool(p.grad.abs().max() > 0)
    }
    assert silent == DEAD


def test_without_masks_the_detections_are_the_same(learner: ConceptLearner, scenes: Scenes) -> None:
    asked = drawn(scenes).prompts
    with torch.no_grad():
        (_, whole), (_, quick) = learner(scenes.images, asked, True), learner(scenes.images, asked, False)
    for name in ("logits", "boxes", "presence"):
        torch.testing.assert_close(getattr(whole, name), getattr(quick, name))
    assert whole.masks.shape[-1] == 36 and quick.masks.shape[-1] == 9


def test_naming_alone_and_questions_without_an_answer_are_steps_too(learner: ConceptLearner, scenes: Scenes) -> None:
    naming = detector_terms(learner, Lesson(scenes, None, masks=True))
    assert list(naming) == list(WEIGHTS)
    assert [name for name, term in naming.items() if term.value != 0] == ["naming"]
    empty = Scenes(scenes.images, scenes.masks, torch.zeros_like(scenes.valid), scenes.concepts)
    terms = detector_terms(learner, Lesson(empty, drawn(empty), masks=True))
    assert terms.nonfinite() == []
    zero = {name for name, term in terms.items() if term.value == 0}
    assert zero == {"l1", "giou", "mask_bce", "mask_dice", "semantic_dice"}
    terms.total.backward()
