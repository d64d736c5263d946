"""The eight terms against torch's own losses, by hand, and one gradient at a time."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional as F

from samdistill.jobs.detection.losses import FEATURE_TERMS, OUTPUT_TERMS, feature_terms, output_terms
from samdistill.losses.box import box_giou, box_l1
from samdistill.losses.mask import soft_mask_loss
from samdistill.ops.matching import MatchCost, Matches, match
from samdistill.types import DetectorOutput

TERMS = (*OUTPUT_TERMS.weights, *FEATURE_TERMS.weights)
FEEDS = dict(
    zip(
        TERMS,
        ("pred_masks", "pred_boxes", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg", "fpn", "encoder"),
        strict=True,
    )
)
"""Which tensor of the student each term teaches."""


def output(p: int = 2, q: int = 4, side: int = 12, seed: int = 0, images: int = 2, grid: int = 3) -> DetectorOutput:
    g = torch.Generator().manual_seed(seed)
    return DetectorOutput(
        pred_masks=2 * torch.randn(p, q, side, side, generator=g),
        pred_boxes=torch.rand(p, q, 2, 2, generator=g).sort(2).values.flatten(2),
        pred_logits=torch.randn(p, q, generator=g),
        presence_logits=torch.randn(p, 1, generator=g),
        semantic_seg=torch.randn(p, 1, side, side, generator=g),
        fpn=tuple(torch.randn(images, 6, grid * k, grid * k, generator=g) for k in (4, 2, 1)),
        encoder=torch.randn(p, 6, grid, grid, generator=g),
    )


def each(x: DetectorOutput, change) -> DetectorOutput:
    """``change`` applied to every tensor."""
    values = {f.name: value for f in fields(x) if (value := getattr(x, f.name)) is not None}
    return DetectorOutput(**{k: tuple(map(change, v)) if k == "fpn" else change(v) for k, v in values.items()})


def leaves(x: DetectorOutput) -> DetectorOutput:
    return each(x, lambda t: t.clone().requires_grad_())


def gradients(x: DetectorOutput) -> dict[str, list[torch.Tensor]]:
    values = {f.name: value for f in fields(x) if (value := getattr(x, f.name)) is not None}
    return {k: [t.grad for t in (v if k == "fpn" else (v,))] for k, v in values.items()}


def matches(*questions: list[tuple[int, int]]) -> Matches:
    """Pairs (student, teacher) of each question; padding that must not be read points at query 0."""
    most = max(len(pairs) for pairs in questions)
    packed = torch.zeros(3, len(questions), most, dtype=torch.int64)
    for i, pairs in enumerate(questions):
        for j, (student, teacher) in enumerate(pairs):
            packed[:, i, j] = torch.tensor([student, teacher, 1])
    return Matches(packed[0], packed[1], packed[2].bool())


def terms(student: DetectorOutput, teacher: DetectorOutput, pairs: Matches, unmatched: bool = True):
    return output_terms(student, teacher, pairs, unmatched) | feature_terms(student, teacher)


UNEVEN = ([(2, 0), (0, 3), (3, 1)], [(1, 2)])


def test_the_names_are_the_terms() -> None:
    found = output_terms(output(), output(seed=1), matches(*UNEVEN))
    assert tuple(found) == TERMS[:6] and tuple(feature_terms(output(), output(seed=1))) == TERMS[6:]
    assert len(set(TERMS)) == 8


def test_soft_mask_loss_by_hand() -> None:
    logit = math.log(3)  # 0.75
    value = soft_mask_loss(torch.tensor([[[logit, 0.0]], [[logit, 0.0]]]), torch.tensor([[[1.0, 0.0]], [[0.75, 0.5]]]))
    dice = (0.25**2 + 0.5**2) / (0.75**2 + 0.5**2 + 1 + 1)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25) + math.log(0.5)) / 2
    assert value.tolist() == pytest.approx([dice - (math.log(0.75) + math.log(0.5)) / 2, entropy])


def test_soft_mask_loss_is_least_at_the_target_itself() -> None:
    logits = 2 * torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(0))
    target = logits.sigmoid()
    right = logits.clone().requires_grad_()
    least = soft_mask_loss(right, target)
    least.sum().backward()
    assert right.grad.abs().max() < 1e-6  # the plain denominator of Dice has a slope here
    for wrong in (logits * 2, logits * 0.5, logits + 0.1, logits - 0.1, logits + 0.1 * torch.randn(3, 9, 9)):
        assert (soft_mask_loss(wrong, target) > least).all()
    start = torch.zeros(3, 9, 9, requires_grad=True)
    optimiser = torch.optim.LBFGS([start], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = soft_mask_loss(start, target).sum()
        value.backward()
        return value

    optimiser.step(closure)
    torch.testing.assert_close(start.detach().sigmoid(), target, rtol=0, atol=2e-3)


def dice_and_bce(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of one mask, in the words of V-Net: 1 - 2 pt / (pp + tt), smoothed by one pixel."""
    p = logits.sigmoid()
    dice = 1 - (2 * (p * target).sum() + 1) / ((p * p).sum() + (target * target).sum() + 1)
    return dice + F.binary_cross_entropy_with_logits(logits, target)


def test_terms_of_pairs_are_means_of_each_questions_pairs_then_of_questions() -> None:
    student, teacher = output(q=4, side=9), output(q=5, side=12, seed=1)
    wanted = dict.fromkeys(("mask", "box_l1", "giou"), 0.0)
    for p, pairs in enumerate(UNEVEN):
        for s, t in pairs:
            ours, theirs = (x.pred_boxes[p, i] for x, i in ((student, s), (teacher, t)))
            large = F.interpolate(student.pred_masks[p, s][None, None], (12, 12), mode="bilinear", align_corners=False)
            values = {
                "mask": dice_and_bce(large[0, 0], teacher.pred_masks[p, t].sigmoid()),
                "box_l1": box_l1(ours, theirs),
                "giou": box_giou(ours, theirs),
            }
            for name, value in values.items():
                wanted[name] += value.item() / len(pairs) / 2
    found = output_terms(student, teacher, matches(*UNEVEN))
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value, rel=1e-5), name


def test_queries_without_a_partner_learn_that_there_is_no_object() -> None:
    student, teacher = output(), output(seed=1)
    target = torch.zeros(2, 4)
    for p, pairs in enumerate(UNEVEN):
        for s, t in pairs:
            target[p, s] = teacher.pred_logits[p, t].sigmoid()
    found = output_terms(student, teacher, matches(*UNEVEN))["logit"]
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(student.pred_logits, target))

    def bce(p: int, queries: list[int]) -> float:
        return F.binary_cross_entropy_with_logits(student.pred_logits[p, queries], target[p, queries]).item()

    found = output_terms(student, teacher, matches(*UNEVEN), unmatched=False)["logit"]
    assert found.item() == pytest.approx((bce(0, [2, 0, 3]) + bce(1, [1])) / 2)


def test_queries_that_correspond_by_index_keep_their_own_target_below_the_floor() -> None:
    student, teacher = output(), output(seed=1)
    floor = float(teacher.scores.median())
    pairs = match(student, teacher, MatchCost(floor=floor), "index")
    assert 0 < pairs.valid.sum() < pairs.valid.numel()
    kept, found = teacher.scores >= floor, output_terms(student, teacher, pairs)
    target, ours = teacher.pred_logits.sigmoid(), student.pred_logits
    torch.testing.assert_close(found["logit"], F.binary_cross_entropy_with_logits(ours, target))
    alone = output_terms(student, teacher, pairs, unmatched=False)["logit"]
    each_query = F.binary_cross_entropy_with_logits(ours, target, reduction="none")
    torch.testing.assert_close(alone, ((each_query * kept).sum(1) / kept.sum(1).clamp(min=1)).mean())
    apart = (student.pred_boxes - teacher.pred_boxes).abs().sum(-1)
    torch.testing.assert_close(found["box_l1"], ((apart * kept).sum(1) / kept.sum(1).clamp(min=1)).mean())


def test_presence_and_semantic_are_torchs() -> None:
    student, teacher = output(p=3, side=8), output(p=3, side=12, seed=1)
    found = output_terms(student, teacher, matches([], [], []))
    torch.testing.assert_close(
        found["presence"], F.mse_loss(student.presence_logits.sigmoid(), teacher.presence_logits.sigmoid())
    )
    entropy = output_terms(student, teacher, matches([], [], []), names=["presence_bce"])["presence_bce"]
    torch.testing.assert_close(
        entropy, F.binary_cross_entropy_with_logits(student.presence_logits, teacher.presence_logits.sigmoid())
    )
    large = F.interpolate(student.semantic_seg, (12, 12), mode="bilinear", align_corners=False)
    each_one = [dice_and_bce(a, b.sigmoid()) for a, b in zip(large, teacher.semantic_seg, strict=True)]
    torch.testing.assert_close(found["semantic"], torch.stack(each_one).mean())


def test_features_are_torchs() -> None:
    student, teacher = output(p=3, grid=3), output(p=3, grid=4, seed=1)

    def mse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(F.interpolate(a, b.shape[-2:], mode="bilinear", align_corners=False), b)

    found = feature_terms(student, teacher)
    levels = [mse(a, b) for a, b in zip(student.fpn, teacher.fpn, strict=True)]
    torch.testing.assert_close(found["fpn"], sum(levels) / 3)
    torch.testing.assert_close(found["encoder"], mse(student.encoder, teacher.encoder))
    same = feature_terms(student, output(p=3, seed=1))
    torch.testing.assert_close(same["encoder"], F.mse_loss(student.encoder, output(p=3, seed=1).encoder))


def test_the_encoder_is_compared_as_a_grid() -> None:
    """A plane is a plane at any size; its flattened tokens interpolated in one dimension are not (rows misalign)."""

    def plane(side: int) -> torch.Tensor:
        centres = (torch.arange(side) + 0.5) / side
        return (centres[:, None] + 2 * centres).expand(2, 6, side, side)

    student, teacher = replace(output(), encoder=plane(63)), replace(output(), encoder=plane(72))
    assert feature_terms(student, teacher)["encoder"].item() < 1e-4
    tokens = F.interpolate(plane(63).flatten(2), 72 * 72, mode="linear")
    assert F.mse_loss(tokens, plane(72).flatten(2)).item() > 1e-2


@pytest.mark.parametrize("name", TERMS)
def test_each_term_teaches_its_own_tensor_and_no_other(name: str) -> None:
    student, teacher = leaves(output(side=9)), leaves(output(side=12, seed=1, grid=4))
    terms(student, teacher, matches(*UNEVEN))[name].backward()
    for tensor, grads in gradients(student).items():
        for grad in grads:
            reached = grad is not None and bool(grad.any())
            assert reached == (tensor == FEEDS[name]), tensor
            assert grad is None or grad.isfinite().all()
    assert all(grad is None for grads in gradients(teacher).values() for grad in grads)


def test_only_the_pairs_learn_masks_and_boxes() -> None:
    student = leaves(output())
    found = output_terms(student, output(seed=1), matches(*UNEVEN), unmatched=False)
    (found["mask"] + found["giou"] + found["box_l1"] + found["logit"]).backward()
    wanted = [[True, False, True, True], [False, True, False, False]]
    assert student.pred_masks.grad.flatten(2).any(2).tolist() == wanted
    assert student.pred_boxes.grad.any(2).tolist() == wanted
    assert (student.pred_logits.grad != 0).tolist() == wanted


def test_a_student_that_answers_as_the_teacher_stands_still() -> None:
    teacher, order = output(), torch.tensor([3, 1, 0, 2])
    student = leaves(
        replace(
            teacher,
            pred_masks=teacher.pred_masks[:, order],
            pred_boxes=teacher.pred_boxes[:, order],
            pred_logits=teacher.pred_logits[:, order],
        )
    )
    found = terms(student, teacher, match(student, teacher, MatchCost(resolution=12)))
    for name in ("box_l1", "giou", "presence", "fpn", "encoder"):
        assert found[name].item() == pytest.approx(0, abs=1e-5), name
    for name in ("mask", "logit", "presence", "semantic", "fpn", "encoder"):
        gradient = torch.autograd.grad(found[name], student.fpn if name == "fpn" else getattr(student, FEEDS[name]))
        assert all(g.abs().max() < 1e-6 for g in gradient), name


@pytest.mark.parametrize("unmatched", [True, False])
def test_a_question_without_a_pair_counts_as_zero(unmatched: bool) -> None:
    student, teacher = leaves(output()), output(seed=1)
    one = output_terms(student, teacher, matches(UNEVEN[0], []), unmatched)
    alone = output_terms(each(student, lambda t: t[:1]), each(teacher, lambda t: t[:1]), matches(UNEVEN[0]), unmatched)
    for name in ("mask", "box_l1", "giou"):
        assert one[name].item() == pytest.approx(alone[name].item() / 2)
    nothing = output_terms(student, teacher, matches([], []), unmatched)
    assert [nothing[name].item() for name in ("mask", "box_l1", "giou")] == [0, 0, 0]
    assert (nothing["logit"].item() == 0) != unmatched
    torch.stack(list(nothing.values())).sum().backward()
    assert not student.pred_masks.grad.any() and not student.pred_boxes.grad.any()
    assert bool(student.pred_logits.grad.all()) == unmatched


def test_no_questions_give_zeros_with_a_graph() -> None:
    student, teacher = leaves(output(p=0, images=0)), output(p=0, images=0, seed=1)
    found = terms(student, teacher, match(student, teacher, MatchCost()))
    assert {name: value.item() for name, value in found.items()} == dict.fromkeys(TERMS, 0.0)
    torch.stack(list(found.values())).sum().backward()
    assert all(grad is not None for grads in gradients(student).values() for grad in grads)


def test_queries_that_are_not_paired_may_hold_anything() -> None:
    """A NaN in padding or in a query without a partner reaches neither value nor gradient."""
    student, teacher = output(), output(seed=1)
    pairs = matches([(1, 1), (2, 2)], [(3, 3)])
    wanted = output_terms(student, teacher, pairs, unmatched=False)
    for x in (student, teacher):
        for tensor in (x.pred_masks, x.pred_boxes, x.pred_logits):
            tensor[:, 0] = math.nan
    student = leaves(student)
    found = output_terms(student, teacher, pairs, unmatched=False)
    torch.testing.assert_close(found, wanted)
    torch.stack(list(found.values())).sum().backward()
    assert student.pred_masks.grad.isfinite().all() and student.pred_boxes.grad.isfinite().all()
    assert student.pred_logits.grad.isfinite().all()


def test_extreme_answers_stay_finite() -> None:
    extreme = each(output(), lambda t: torch.sign(t) * 6e4)
    for student, teacher in ((leaves(extreme), output()), (leaves(output()), extreme)):
        found = terms(student, teacher, matches(*UNEVEN))
        total = torch.stack(list(found.values())).sum()
        total.backward()
        assert total.isfinite() and all(g.isfinite().all() for grads in gradients(student).values() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_terms_and_gradients_of_the_same_numbers(dtype: torch.dtype) -> None:
    student, teacher = (
        each(output(side=side, seed=seed, grid=grid), lambda t: (9 * t).to(dtype))
        for side, seed, grid in ((9, 0, 3), (12, 1, 4))
    )
    half, full = leaves(student), leaves(each(student, torch.Tensor.float))
    with torch.autocast("cpu", torch.bfloat16):
        found = terms(half, teacher, matches(*UNEVEN))
    wanted = terms(full, each(teacher, torch.Tensor.float), matches(*UNEVEN))
    for name in TERMS:
        assert found[name].dtype == torch.float32 and torch.equal(found[name], wanted[name]), name
    torch.stack(list(found.values())).sum().backward()
    torch.stack(list(wanted.values())).sum().backward()
    for ours, theirs in zip(gradients(half).values(), gradients(full).values(), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == dtype and b.any()
            torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=1e-4)


def test_what_does_not_fit_is_not_broadcast() -> None:
    with pytest.raises(ValueError, match="questions"):
        output_terms(output(p=2), output(p=1), matches(*UNEVEN))
    with pytest.raises(ValueError, match="questions"):
        output_terms(output(), output(), matches([(0, 0)]))
    with pytest.raises(ValueError, match="do not match"):
        feature_terms(output(), replace(output(), encoder=torch.zeros(2, 1, 3, 3)))
    with pytest.raises(ValueError, match="do not match"):
        feature_terms(output(images=2), output(images=1))
    with pytest.raises(ValueError, match="shorter"):
        feature_terms(output(), replace(output(), fpn=output().fpn[:2]))
