"""Answers about a frame against its annotations: cases done by hand, and how published code went wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from samdistill.jobs.video.losses import MEMORY_TERMS, video_terms
from samdistill.ops.matching import MatchCost, match_truth
from samdistill.types import DetectorOutput, ObjectTruth

SIDE, SURE = 8, 12.0


def boxed(left: int, top: int, right: int, bottom: int) -> Tensor:
    mask = torch.zeros(SIDE, SIDE)
    mask[top:bottom, left:right] = 1
    return mask


LEFT, RIGHT = boxed(0, 0, 4, 8), boxed(4, 0, 8, 8)
BOX_LEFT, BOX_RIGHT = torch.tensor([0.0, 0.0, 0.5, 1.0]), torch.tensor([0.5, 0.0, 1.0, 1.0])


def said(masks: list[Tensor], boxes: list[Tensor], logits: list[float], presence: float = 0.0) -> DetectorOutput:
    pixels = (torch.stack(masks)[None] * 2 - 1) * SURE
    empty = torch.zeros(1, 1, 1, 1)
    return DetectorOutput(
        pixels.requires_grad_(), torch.stack(boxes)[None].clone().requires_grad_(),
        torch.tensor([logits]).requires_grad_(), torch.tensor([[presence]]).requires_grad_(), empty, (), empty,
    )  # fmt: skip


def truth(*objects: tuple[Tensor, Tensor], padding: int = 0) -> ObjectTruth:
    masks = [mask for mask, _ in objects] + [torch.zeros(SIDE, SIDE)] * padding
    boxes = [box for _, box in objects] + [torch.zeros(4)] * padding
    valid = torch.tensor([[True] * len(objects) + [False] * padding])
    if not masks:
        return ObjectTruth(torch.zeros(1, 0, SIDE, SIDE), torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.bool))
    return ObjectTruth(torch.stack(masks)[None], torch.stack(boxes)[None], valid)


def terms(student: DetectorOutput, wanted: ObjectTruth) -> dict[str, Tensor]:
    return video_terms(student, wanted, match_truth(student, wanted, MatchCost(resolution=SIDE)))


def test_a_perfect_answer_costs_what_its_uncertainty_costs():
    student = said([RIGHT, LEFT, boxed(0, 0, 1, 1)], [BOX_RIGHT, BOX_LEFT, BOX_LEFT], [SURE, SURE, -SURE], SURE)
    found = terms(student, truth((LEFT, BOX_LEFT), (RIGHT, BOX_RIGHT)))
    assert tuple(found) == tuple(MEMORY_TERMS.weights)
    assert all(value.item() == pytest.approx(0, abs=1e-4) for value in found.values())


def test_values_by_hand():
    """One object, two queries: the better one is half of the object, with a probability of one half."""
    half = boxed(0, 0, 4, 4)
    student = said([half, RIGHT], [BOX_LEFT, BOX_RIGHT], [0.0, 0.0])
    found = terms(student, truth((LEFT, BOX_LEFT), padding=2))
    missed = 16 / 64  # pixels of the object that the mask leaves out, each with a cross-entropy of SURE
    dice = 16 / (16 + 32 + 1)  # |p - t|^2 over |p|^2 + |t|^2 + 1
    assert found["mask"].item() == pytest.approx(dice + missed * SURE, rel=1e-4)
    assert found["box_l1"].item() == 0 and found["giou"].item() == pytest.approx(0, abs=1e-6)
    assert found["iou"].item() == pytest.approx(((0.5 - 0.5) ** 2 + (0.5 - 0) ** 2) / 2)
    assert found["presence"].item() == pytest.approx(math.log(2))
    assert found["select"].item() == pytest.approx(math.log(2))  # two queries with the same logit


def test_select_is_the_cross_entropy_of_partners_against_the_queries_without_one():
    logits = [0.3, 2.0, -1.0, 1.5]
    student = said([LEFT, RIGHT, LEFT, RIGHT], [BOX_LEFT, BOX_RIGHT, BOX_RIGHT, BOX_LEFT], logits)
    found = terms(student, truth((LEFT, BOX_LEFT), (RIGHT, BOX_RIGHT)))["select"]  # partners are queries 0 and 1
    shares = [math.exp(x) / (math.exp(x) + math.exp(-1.0) + math.exp(1.5)) for x in (0.3, 2.0)]
    assert found.item() == pytest.approx(-sum(map(math.log, shares)) / 2, rel=1e-5)
    (grad,) = torch.autograd.grad(found, student.pred_logits)
    assert (grad[0, :2] < 0).all() and (grad[0, 2:] > 0).all()
    alone = said([LEFT], [BOX_LEFT], [0.0])
    lone = terms(alone, truth((LEFT, BOX_LEFT)))["select"]
    assert lone.item() == 0 and torch.autograd.grad(lone, alone.pred_logits)[0].item() == 0  # nobody to beat


def test_a_frame_without_objects_teaches_that_nothing_is_there():
    student = said([LEFT, RIGHT], [BOX_LEFT, BOX_RIGHT], [0.0, SURE], 0.0)
    for wanted in (truth(), truth(padding=3)):
        found = terms(student, wanted)
        assert found["mask"].item() == found["box_l1"].item() == found["giou"].item() == 0
        assert found["iou"].item() == pytest.approx((0.25 + 1) / 2, rel=1e-3)
        assert found["presence"].item() == pytest.approx(math.log(2))
        grads = torch.autograd.grad(sum(found.values()), (student.pred_logits, student.presence_logits))
        assert (grads[0] > 0)[0, 0] and (grads[1] > 0).all()


def test_a_perfect_mask_is_preferred_to_one_that_covers_everything():
    """Published matchers take a sigmoid of binary ground truth: 0.5 and 0.73 everywhere, nearest to all ones."""
    everything = torch.ones(SIDE, SIDE)
    student = said([everything, LEFT], [BOX_LEFT, BOX_LEFT], [0.0, 0.0])
    matches = match_truth(student, truth((LEFT, BOX_LEFT)), MatchCost(box=0, logit=0, resolution=SIDE))
    assert matches.student.tolist() == [[1]] and matches.teacher.tolist() == [[0]]


def test_every_object_gets_a_query_of_its_own_and_padding_none():
    student = said([LEFT, LEFT, RIGHT], [BOX_LEFT, BOX_LEFT, BOX_RIGHT], [SURE, 0.0, 0.0])
    wanted = truth((RIGHT, BOX_RIGHT), (LEFT, BOX_LEFT), padding=1)
    question, ours, theirs = match_truth(student, wanted, MatchCost(resolution=SIDE)).pairs
    assert dict(zip(theirs.tolist(), ours.tolist(), strict=True)) == {0: 2, 1: 0} and question.tolist() == [0, 0]


def test_more_objects_than_queries_leave_some_without():
    student = said([LEFT], [BOX_LEFT], [0.0])
    matches = match_truth(student, truth((RIGHT, BOX_RIGHT), (LEFT, BOX_LEFT)), MatchCost(resolution=SIDE))
    assert matches.pairs[2].tolist() == [1]


def test_annotations_of_another_size_are_averaged_over_areas():
    fine = LEFT.repeat_interleave(2, 0).repeat_interleave(2, 1)
    student = said([LEFT], [BOX_LEFT], [SURE], SURE)
    wanted = ObjectTruth(fine[None, None], BOX_LEFT[None, None], torch.ones(1, 1, dtype=torch.bool))
    assert terms(student, wanted)["mask"].item() == pytest.approx(0, abs=1e-4)


def test_every_term_reaches_the_answer():
    torch.manual_seed(0)
    student = DetectorOutput(
        torch.randn(2, 3, SIDE, SIDE, requires_grad=True), torch.rand(2, 3, 4).sort(-1).values.requires_grad_(),
        torch.randn(2, 3, requires_grad=True), torch.randn(2, 1, requires_grad=True), torch.zeros(2, 1, 1, 1), (),
        torch.zeros(2, 1, 1, 1),
    )  # fmt: skip
    both = torch.stack([torch.stack([LEFT, RIGHT])] * 2)
    wanted = ObjectTruth(both, torch.stack([torch.stack([BOX_LEFT, BOX_RIGHT])] * 2),
                         torch.tensor([[True, True], [True, False]]))  # fmt: skip
    found = terms(student, wanted)
    reached = {"mask": student.pred_masks, "box_l1": student.pred_boxes, "giou": student.pred_boxes,
               "iou": student.pred_logits, "presence": student.presence_logits}  # fmt: skip
    for name, tensor in reached.items():
        (gradient,) = torch.autograd.grad(found[name], tensor, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


def test_answers_to_another_number_of_questions_are_refused():
    student, wanted = said([LEFT], [BOX_LEFT], [0.0]), truth((LEFT, BOX_LEFT))
    matches = match_truth(student, wanted, MatchCost(resolution=SIDE))
    two = ObjectTruth(*(torch.cat([t, t]) for t in (wanted.masks, wanted.boxes, wanted.valid)))
    with pytest.raises(ValueError, match="1, 2, 1"):
        video_terms(student, two, matches)
    with pytest.raises(ValueError, match="numbers of questions differ: student 1, target 2"):
        match_truth(student, two, MatchCost(resolution=SIDE))
