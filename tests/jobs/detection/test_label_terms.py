"""Terms of labels against other libraries' losses, the published formula, brute force, and one gradient at a time."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import permutations

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from samdistill.engine.shares import shares
from samdistill.jobs.detection.config import DetectionLossConfig
from samdistill.jobs.detection.label_terms import LABEL_TERMS, coarse_truth, label_counts, label_terms
from samdistill.jobs.detection.losses import FEATURE_TERMS, OUTPUT_TERMS
from samdistill.ops.matching import MatchCost, truth_cost
from samdistill.types import DetectorOutput, QuestionLabels

COST, SIDE = MatchCost(resolution=12), 12
TERMS = tuple(LABEL_TERMS.published)
FEEDS = dict(
    zip(TERMS, ("pred_masks", "pred_masks", "pred_boxes", "pred_boxes", "pred_logits", "presence_logits"), strict=True)
)
"""Which tensor of the student each term teaches."""


def output(p: int = 4, q: int = 5, side: int = SIDE, seed: int = 0) -> DetectorOutput:
    g = torch.Generator().manual_seed(seed)
    return DetectorOutput(
        pred_masks=2 * torch.randn(p, q, side, side, generator=g),
        pred_boxes=torch.rand(p, q, 2, 2, generator=g).sort(2).values.flatten(2),
        pred_logits=torch.randn(p, q, generator=g),
        presence_logits=torch.randn(p, 1, generator=g),
        semantic_seg=torch.randn(p, 1, side, side, generator=g),
        fpn=(),
        encoder=torch.randn(p, 6, 3, 3, generator=g),
    )


def labels(*counts: int | None, partial: tuple[int, ...] = ()) -> QuestionLabels:
    """``counts`` objects of each question; None where nothing is known."""
    g = torch.Generator().manual_seed(7)
    own = torch.tensor([count or 0 for count in counts])
    valid = torch.arange(max(1, int(own.max()))) < own[:, None]
    boxes = torch.rand(*valid.shape, 2, 2, generator=g).sort(2).values.flatten(2) * valid[..., None]
    numbers = torch.arange(len(counts))
    return QuestionLabels(
        torch.randint(0, 256, (int(own.sum()), SIDE, SIDE), dtype=torch.uint8, generator=g), boxes, valid,
        torch.tensor([count is not None for count in counts]),
        torch.tensor([bool(count) for count in counts]), ~torch.isin(numbers, torch.tensor(partial, dtype=torch.int64)),
    )  # fmt: skip


UNEVEN = labels(2, 0, None, 3)
"""Two objects, known to be absent, unknown, and three objects."""


def pairs(student: DetectorOutput, found: QuestionLabels) -> list[list[tuple[int, int]]]:
    """Pairs (query, object) of each question, of lowest total cost among all assignments."""
    cost, chosen = truth_cost(student, coarse_truth(found, SIDE), COST), []
    for row, valid in zip(cost, found.valid, strict=True):
        count = int(valid.sum())
        ways = permutations(range(row.shape[0]), count)
        best = min(ways, key=lambda way: sum(row[query, slot].item() for slot, query in enumerate(way)))
        chosen.append([(query, slot) for slot, query in enumerate(best)])
    return chosen


def mask_of(found: QuestionLabels, question: int, slot: int) -> torch.Tensor:
    first = int(found.valid[:question].sum())
    return found.masks[first + slot].float() / 255


def test_every_term_is_off_by_default_and_apart_from_the_teachers() -> None:
    default = DetectionLossConfig()
    assert not set(default.named) & set(TERMS) and not set(TERMS) & {*OUTPUT_TERMS, *FEATURE_TERMS}
    assert sorted(TERMS) == LABEL_TERMS.names() and all(name.startswith("label_") for name in TERMS)
    assert DetectionLossConfig.model_validate({"label_dice": 3.0}).weight("label_dice") == 3.0


def test_terms_of_pairs_are_means_over_the_objects_then_over_the_questions_with_one() -> None:
    student = output()
    found = label_terms(student, UNEVEN, COST, TERMS)
    per_question: dict[str, list[float]] = {name: [] for name in TERMS[:4]}
    for p, chosen in enumerate(pairs(student, UNEVEN)):
        values: dict[str, list[float]] = {name: [] for name in per_question}
        for query, slot in chosen:
            logits, target = student.pred_masks[p, query], mask_of(UNEVEN, p, slot)
            ours, theirs = student.pred_boxes[p, query], UNEVEN.boxes[p, slot]
            soft = logits.sigmoid()
            # torchvision's focal weights |t - p| only for t of 0 and 1, so its factor is written out for other t
            bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            alpha = 0.25 * target + 0.75 * (1 - target)
            values["label_mask"].append((alpha * (soft - target).abs() ** 2 * bce).mean().item())
            dice = 1 - (2 * (soft * target).sum() + 1) / ((soft**2).sum() + (target**2).sum() + 1)
            values["label_dice"].append(dice.item())
            values["label_box_l1"].append((ours - theirs).abs().sum().item())
            values["label_giou"].append(1 - generalized_box_iou(ours[None], theirs[None]).item())
        for name, own in values.items():
            per_question[name] += [sum(own) / len(own)] if own else []
    for name, own in per_question.items():
        assert len(own) == 2
        assert found[name].item() == pytest.approx(sum(own) / 2, rel=1e-4), name


def test_focal_masks_are_torchvisions_where_masks_are_binary() -> None:
    student, binary = output(1), replace(labels(1), masks=labels(1).masks // 128 * 255)
    ((query, slot),) = pairs(student, binary)[0]
    target = mask_of(binary, 0, slot)
    assert set(target.unique().tolist()) == {0.0, 1.0}
    wanted = sigmoid_focal_loss(student.pred_masks[0, query], target, 0.25, 2.0, "mean")
    assert label_terms(student, binary, COST, ["label_mask"])["label_mask"].item() == pytest.approx(
        wanted.item(), rel=1e-5
    )


def published_score(student: DetectorOutput, found: QuestionLabels, complete: bool = True) -> list[float]:
    """The scores' loss of each question in the words of SAM 3's paper: quality targets, ten times as heavy."""
    values = []
    for p, chosen in enumerate(pairs(student, found)):
        total = 0.0
        for query, logit in enumerate(student.pred_logits[p]):
            probability = logit.sigmoid()
            slot = dict(chosen).get(query)
            if slot is None:
                total += float(complete) * (probability**2 * F.softplus(logit)).item()
                continue
            a, b = student.pred_boxes[p, query], found.boxes[p, slot]
            inter = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
            union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inter
            wanted = max(0.01, (probability**0.25 * (inter / union) ** 0.75).item())
            total += 10 * (F.softplus(logit) - wanted * logit).item()
        values.append(total / student.pred_logits.shape[1])
    return values


@pytest.mark.parametrize("complete", [True, False])
def test_scores_are_the_published_ones_and_partial_labels_excuse_unmatched_queries(complete: bool) -> None:
    student = output()
    found = labels(2, 0, None, 3, partial=() if complete else (0, 3))
    each = published_score(student, found, complete)
    value = label_terms(student, found, COST, ["label_score"])["label_score"]
    assert value.item() == pytest.approx((each[0] + each[3]) / 2, rel=1e-4)  # the others have no object


def test_presence_is_asked_where_it_is_known() -> None:
    """A crowd is present, without any object to match."""
    found = labels(2, 0, None, 0)
    found = replace(found, present=torch.tensor([True, False, False, True]))
    student = output()
    logits = student.presence_logits[:, 0]
    wanted = (F.softplus(-logits[0]) + F.softplus(logits[1]) + F.softplus(-logits[3])) / 3
    value = label_terms(student, found, COST, ["label_presence"])["label_presence"]
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_queries_are_matched_by_cost_and_not_by_index() -> None:
    """With the queries in another order every term is the same, and its gradient moves along."""
    student = output()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    shuffled = replace(student, pred_masks=student.pred_masks[:, order], pred_boxes=student.pred_boxes[:, order],
                       pred_logits=student.pred_logits[:, order])  # fmt: skip
    one, other = (label_terms(each, UNEVEN, COST, TERMS) for each in (student, shuffled))
    assert {name: value.item() for name, value in one.items()} == pytest.approx(
        {name: value.item() for name, value in other.items()}, rel=1e-5
    )


def test_more_objects_than_queries_leaves_some_unmatched() -> None:
    found = label_terms(output(2, 3), labels(5, 1), COST, TERMS)
    assert all(value.isfinite() for value in found.values())


@pytest.mark.parametrize("name", TERMS)
def test_each_term_teaches_one_output(name: str) -> None:
    student = output()
    leaves = {f.name: value.clone().requires_grad_() for f in fields(student)
              if isinstance(value := getattr(student, f.name), torch.Tensor)}  # fmt: skip
    label_terms(replace(student, **leaves), UNEVEN, COST, [name])[name].backward()
    reached = {at for at, value in leaves.items() if value.grad is not None and value.grad.any()}
    assert reached == {FEEDS[name]}
    silent = leaves[FEEDS[name]].grad[2]  # nothing is known about this question
    assert not silent.any() and bool(leaves[FEEDS[name]].grad[1].any()) is (name == "label_presence")


@pytest.mark.parametrize("counts", [(None, None, None, None), (0, 0, None, 0)])
def test_without_objects_terms_are_zero_and_attached(counts: tuple[int | None, ...]) -> None:
    student = output()
    logits = student.pred_logits.clone().requires_grad_()
    masks = student.pred_masks.clone().requires_grad_()
    found = label_terms(replace(student, pred_logits=logits, pred_masks=masks), labels(*counts), COST, TERMS[:5])
    assert all(value.item() == 0 for value in found.values())
    torch.stack([found["label_score"], found["label_dice"]]).sum().backward()
    assert not logits.grad.any() and not masks.grad.any()


def test_masks_of_another_size_are_resized_to_the_labels() -> None:
    found = label_terms(output(side=9), UNEVEN, COST, TERMS)
    assert all(value.isfinite() for value in found.values())
    with pytest.raises(ValueError, match="numbers of questions differ"):
        label_terms(output(3), UNEVEN, COST, TERMS)


def test_parts_of_a_batch_weighted_by_their_counts_are_the_batch() -> None:
    """Over ranks and micro-batches, which have other numbers of questions with labels."""
    student, found = output(), UNEVEN
    whole, counts, values = label_terms(student, found, COST, TERMS), [], []
    assert label_counts(found, TERMS) == {**dict.fromkeys(TERMS[:5], 2), "label_presence": 3}
    for rows, objects in ((slice(0, 1), slice(0, 2)), (slice(1, 3), slice(2, 2)), (slice(3, 4), slice(2, 5))):
        cut = {
            f.name: value[rows] for f in fields(student) if isinstance(value := getattr(student, f.name), torch.Tensor)
        }
        own = {f.name: getattr(found, f.name)[rows] for f in fields(found) if f.name != "masks"}
        part = QuestionLabels(masks=found.masks[objects], **own)
        counts.append(label_counts(part, TERMS))
        values.append(label_terms(replace(student, **cut), part, COST, TERMS))
    factors = shares(counts, 1, lambda total: total, torch.device("cpu"))
    for name in TERMS:
        mean = sum(value[name] * factor[name] for value, factor in zip(values, factors, strict=True)) / 3
        assert mean.item() == pytest.approx(whole[name].item(), rel=1e-5), name
