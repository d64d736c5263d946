"""Matching against all permutations, all pixels and known partners."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from samdistill.ops.matching import MATCHERS, MatchCost, Matches, greedy, hungarian, match, match_cost
from samdistill.types import DetectorOutput, UserError


def output(p: int = 2, q: int = 5, side: int = 24, seed: int = 0) -> DetectorOutput:
    """Smooth random masks, random boxes and scores; every concept surely present."""
    g = torch.Generator().manual_seed(seed)
    coarse = 4 * torch.randn(p * q, 1, 4, 4, generator=g)
    masks = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").reshape(p, q, side, side)
    return DetectorOutput(
        pred_masks=masks,
        pred_boxes=torch.rand(p, q, 2, 2, generator=g).sort(2).values.flatten(2),
        pred_logits=torch.randn(p, q, generator=g),
        presence_logits=torch.full((p, 1), 20.0),
        semantic_seg=torch.zeros(p, 1, side, side),
        fpn=(),
        encoder=torch.zeros(p, 1, 2, 2),
    )


def reordered(x: DetectorOutput, order: torch.Tensor) -> DetectorOutput:
    return replace(
        x, pred_masks=x.pred_masks[:, order], pred_boxes=x.pred_boxes[:, order], pred_logits=x.pred_logits[:, order]
    )


def binary(*masks: torch.Tensor) -> DetectorOutput:
    """One question whose queries have these masks, surely; boxes and scores all alike."""
    logits = 40.0 * torch.stack(masks)[None].float() - 20
    return replace(
        output(1, len(masks)), pred_masks=logits, pred_boxes=torch.zeros(1, len(masks), 4),
        pred_logits=torch.zeros(1, len(masks)),
    )  # fmt: skip


def random_cost(p: int, qs: int, qt: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(p, qs, qt, generator=torch.Generator().manual_seed(seed))


def totals(cost: torch.Tensor, matches: Matches) -> torch.Tensor:
    question, student, teacher = matches.pairs
    return torch.zeros(len(cost)).index_add(0, question, cost[question, student, teacher])


def brute(cost: torch.Tensor) -> float:
    """Least total over all ways to give each query of the smaller side a partner."""
    small = cost if cost.shape[0] <= cost.shape[1] else cost.T
    ways = permutations(range(small.shape[1]), small.shape[0])
    return min(sum(small[i, j].item() for i, j in enumerate(way)) for way in ways)


@pytest.mark.parametrize(("qs", "qt"), [(4, 4), (3, 6), (6, 3), (1, 5), (5, 1)])
def test_hungarian_is_the_best_of_all_permutations_and_greedy_never_better(qs: int, qt: int) -> None:
    allowed = torch.ones(3, qt, dtype=torch.bool)
    for seed in range(4):
        cost = random_cost(3, qs, qt, seed)
        best = totals(cost, hungarian(cost, allowed))
        assert best.tolist() == pytest.approx([brute(c) for c in cost])
        assert (totals(cost, greedy(cost, allowed)) >= best - 1e-6).all()


def test_greedy_takes_the_cheapest_first() -> None:
    cost = torch.tensor([[[0.0, 1.0], [2.0, 9.0]]])
    allowed = torch.ones(1, 2, dtype=torch.bool)
    assert totals(cost, greedy(cost, allowed)).item() == 9  # 0 first, then what is left
    assert totals(cost, hungarian(cost, allowed)).item() == 3


@pytest.mark.parametrize("name", MATCHERS)
def test_pairs_are_one_to_one_allowed_and_as_many_as_fit(name: str) -> None:
    cost = random_cost(4, 6, 9)
    allowed = torch.zeros(4, 9, dtype=torch.bool)
    allowed[0] = True
    allowed[1, [2, 5, 8]] = True
    allowed[3, 4] = True
    matches = MATCHERS.get(name)(cost, allowed)
    assert matches.valid.sum(1).tolist() == [6, 3, 0, 1] and matches.valid.shape == (4, 6)
    assert not matches.student[~matches.valid].any() and not matches.teacher[~matches.valid].any()
    question, student, teacher = matches.pairs
    assert allowed[question, teacher].all()
    assert len(set(zip(question.tolist(), student.tolist(), strict=True))) == 10
    assert len(set(zip(question.tolist(), teacher.tolist(), strict=True))) == 10
    alone = MATCHERS.get(name)(cost[1:2], allowed[1:2])  # neither its neighbours nor the padding change a question
    kept = matches.valid[1]
    assert torch.equal(matches.student[1, kept], alone.student[0])
    assert torch.equal(matches.teacher[1, kept], alone.teacher[0])
    taken = matches.matched(6)
    assert taken.sum(1).tolist() == [6, 3, 0, 1] and taken[3, student[-1]]


@pytest.mark.parametrize("name", MATCHERS)
def test_nothing_to_match(name: str) -> None:
    for p, qs, qt in ((2, 4, 5), (2, 0, 5), (2, 4, 0), (0, 4, 5)):
        allowed = torch.zeros(p, qt, dtype=torch.bool) if qs and qt else torch.ones(p, qt, dtype=torch.bool)
        matches = MATCHERS.get(name)(random_cost(p, qs, qt), allowed)
        assert matches.valid.shape == (p, 0) and matches.student.dtype == torch.int64
        assert matches.matched(qs).shape == (p, qs) and not matches.matched(qs).any()


@pytest.mark.parametrize("name", MATCHERS)
def test_costs_that_are_no_numbers_are_taken_last(name: str) -> None:
    allowed = torch.ones(1, 3, dtype=torch.bool)
    for bad in (float("nan"), float("inf"), -float("inf")):
        cost = torch.tensor([[[bad, 1.0, 9.0], [0.5, bad, bad], [bad, 9.0, 2.0]]])
        matches = MATCHERS.get(name)(cost, allowed)
        assert totals(cost, matches).item() == pytest.approx(3.5)
        assert MATCHERS.get(name)(torch.full((1, 2, 3), bad), allowed).valid.tolist() == [[True, True]]


@pytest.mark.parametrize("name", MATCHERS)
def test_a_student_that_is_the_teacher_reordered_finds_the_order(name: str) -> None:
    teacher, order = output(2, 7), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    student = reordered(teacher, order)
    for cost in (
        MatchCost(),
        MatchCost(1, 0, 0, 24),
        MatchCost(0, 1, 0),
        MatchCost(0, 0, 1),
    ):  # each cost by itself too
        matches = match(student, teacher, cost, name)
        at = matches.student.argsort(1)
        assert matches.valid.all() and torch.equal(matches.teacher.gather(1, at), order.expand(2, -1))


def test_more_queries_than_the_teacher_leaves_the_rest_alone() -> None:
    student = output(2, 8, seed=1)
    matches = match(student, output(2, 3), MatchCost())
    assert matches.valid.shape == (2, 3) and matches.valid.all()
    assert matches.teacher.sort(1).values.tolist() == [[0, 1, 2]] * 2
    assert matches.matched(8).sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("name", MATCHERS)
def test_the_best_of_a_larger_teacher_are_always_among_the_targets(name: str) -> None:
    """However near a student is to the teacher's idle queries: here it is a copy of them."""
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        teacher = output(3, 9, seed=seed)
        presence = torch.randn(3, 1, generator=g)
        scores = torch.stack([torch.randperm(9, generator=g) for _ in range(3)]).float()  # no two alike
        teacher = replace(teacher, pred_logits=scores - 4, presence_logits=presence)
        idle = scores.argsort(1)[0, :4]
        matches = match(reordered(teacher, idle), teacher, MatchCost(), name)
        best = [{query for query in range(9) if scores[p, query] >= 5} for p in range(3)]
        assert [set(row) for row in matches.teacher.tolist()] == best and matches.valid.all()


def test_the_floor_is_on_the_joint_score() -> None:
    teacher = replace(
        output(2, 3),
        pred_logits=torch.tensor([[2.0, 0.0, -2.0], [2.0, 2.0, 2.0]]),
        presence_logits=torch.tensor([[20.0], [-2.0]]),  # the second concept is hardly there, whatever its queries say
    )
    student = output(2, 5, seed=1)
    matches = match(student, teacher, MatchCost(floor=0.5))
    assert matches.valid.sum(1).tolist() == [2, 0] and sorted(matches.teacher[0].tolist()) == [0, 1]
    assert match(student, teacher, MatchCost(floor=1.1)).valid.shape == (2, 0)


def test_each_cost_by_hand() -> None:
    left, top = torch.zeros(24, 24), torch.zeros(24, 24)
    left[:, :12], top[:8] = 1, 1
    student, teacher = binary(left), binary(top, left)
    overlap = match_cost(student, teacher, MatchCost(3, 0, 0, 24))
    iou = (8 * 12) / (24 * 12 + 8 * 24 - 8 * 12)
    assert overlap[0, 0].tolist() == pytest.approx([3 * (1 - iou), 0], abs=1e-5)
    student = replace(student, pred_boxes=torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]), pred_logits=torch.zeros(1, 1))
    teacher = replace(
        teacher,
        pred_boxes=torch.tensor([[[0.1, 0.1, 0.5, 0.4], [0, 0, 0, 0]]]),
        pred_logits=torch.tensor([[50.0, -50]]),
    )
    assert match_cost(student, teacher, MatchCost(0, 2, 0))[0, 0].tolist() == pytest.approx([0.6, 2.0])
    assert match_cost(student, teacher, MatchCost(0, 0, 4))[0, 0].tolist() == pytest.approx([2.0, 2.0])
    both = match_cost(student, teacher, MatchCost(3, 2, 4, 24))[0, 0]
    assert both.tolist() == pytest.approx([3 * (1 - iou) + 0.6 + 2, 4.0], abs=1e-5)


def test_a_mask_of_ones_never_beats_the_right_one() -> None:
    """Squashing binary masks once more makes background 0.5 and the full mask the nearest to everything."""
    disc = (torch.arange(24)[:, None] - 9) ** 2 + (torch.arange(24) - 14) ** 2 < 30
    teacher, student = binary(disc), binary(torch.ones(24, 24), disc, torch.zeros(24, 24))
    cost = match_cost(student, teacher, MatchCost(1, 0, 0, 24))[0, :, 0]
    assert cost.tolist() == pytest.approx([1 - disc.float().mean().item(), 0, 1], abs=1e-5)
    assert match(student, teacher, MatchCost(1, 0, 0)).student.tolist() == [[1]]


def test_a_soft_mask_is_nearest_to_itself() -> None:
    """Surer and fainter copies of the right mask cost more."""
    teacher = output(1, 1)
    copies = torch.cat([teacher.pred_masks * factor for factor in (0.3, 1, 3, 30)], 1)
    student = replace(output(1, 4), pred_masks=copies)
    cost = match_cost(student, teacher, MatchCost(1, 0, 0, 24))[0, :, 0]
    assert cost[1].item() == pytest.approx(0, abs=1e-5) and cost[[0, 2, 3]].min() > 1e-3


def test_masks_of_other_sizes_meet_at_the_resolution() -> None:
    """A student at 21 px and a teacher at 24: the same half plane at every resolution, also a finer one."""
    student, teacher = binary(torch.ones(21, 21)), binary(torch.ones(24, 24), torch.arange(24).expand(24, 24) < 12)
    for side in (6, 12, 72):
        cost = match_cost(student, teacher, MatchCost(1, 0, 0, side))[0, 0]
        assert cost.tolist() == pytest.approx([0, 0.5], abs=1e-5)


def test_a_thin_object_is_still_there_at_a_low_resolution() -> None:
    """A line of one pixel in a sure background: averaged logits would say that nothing is there."""
    line, elsewhere = torch.zeros(24, 24), torch.zeros(24, 24)
    line[:, 5] = 1
    elsewhere[:, 18] = 1
    student, teacher = binary(elsewhere, line), binary(line)
    cost = match_cost(student, teacher, MatchCost(1, 0, 0, 6))[0, :, 0]
    assert cost.tolist() == pytest.approx([1, 0], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_what_the_same_numbers_cost(dtype: torch.dtype) -> None:
    def cast(x: DetectorOutput, to: torch.dtype) -> DetectorOutput:
        return replace(
            x, pred_masks=x.pred_masks.to(to), pred_boxes=x.pred_boxes.to(to), pred_logits=x.pred_logits.to(to)
        )

    student, teacher = (cast(output(2, 5, seed=seed), dtype) for seed in (0, 1))
    wanted = match_cost(cast(student, torch.float32), cast(teacher, torch.float32), MatchCost())
    with torch.autocast("cpu", torch.bfloat16):
        value = match_cost(student, teacher, MatchCost())
    assert value.dtype == torch.float32 and torch.equal(value, wanted)
    assert match(student, teacher, MatchCost()).valid.all()
    assert hungarian(wanted.to(dtype), torch.ones(2, 5, dtype=torch.bool)).valid.all()


def test_empty_batches_and_mistakes() -> None:
    assert match(output(0, 4), output(0, 6), MatchCost()).valid.shape == (0, 0)
    assert match(output(2, 0), output(2, 6), MatchCost()).valid.shape == (2, 0)
    with pytest.raises(ValueError, match="numbers of questions differ: student 2, target 1"):
        match_cost(output(2), output(1), MatchCost())
    with pytest.raises(UserError, match="hungarian"):
        match(output(), output(), MatchCost(), "hungrian")


def test_matching_leaves_no_graph() -> None:
    student = output()
    student.pred_masks.requires_grad_()
    assert match_cost(student, output(), MatchCost()).requires_grad
    assert not match(student, output(), MatchCost()).student.requires_grad


def test_queries_of_one_model_correspond_by_index_as_by_lowest_cost() -> None:
    teacher = output(3, 7)
    for floor in (0.0, 0.4):
        own, wanted = (match(teacher, teacher, MatchCost(floor=floor), method) for method in ("index", "hungarian"))
        assert [t.tolist() for t in own.pairs] == [t.tolist() for t in wanted.pairs]
        assert own.aligned and not wanted.aligned and 0 < own.valid.sum() <= 21
        assert not own.student[~own.valid].any() and not own.teacher[~own.valid].any()
    kept = match(teacher, teacher, MatchCost(floor=0.4), "index")
    assert torch.equal(kept.matched(7), teacher.scores >= 0.4)
    with pytest.raises(ValueError, match="only if both models have the same"):
        match(output(3, 6), teacher, MatchCost(), "index")
