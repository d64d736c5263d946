"""One-to-one matching of a student's queries with a teacher's queries or with annotated objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from ..registry import MATCHERS
from ..types import DetectorOutput, ObjectTruth

INDEX = "index"
"""Name that pairs queries of the same index, without a cost."""
VERY_EXPENSIVE = 1e9
"""Cost that replaces a cost that is not finite. Such a pair is matched last, and the loss then reports the error."""


@dataclass(frozen=True)
class MatchCost:
    """Weights of the matching cost.

    Attributes:
        mask: Weight of the mask cost.
        box: Weight of the box cost.
        logit: Weight of the score cost.
        resolution: Side in pixels to which masks are resized before they are compared.
        floor: Teacher queries with a lower score are not matched.
    """

    mask: float = 2.0
    box: float = 5.0
    logit: float = 2.0
    resolution: int = 72
    floor: float = 0.0


@dataclass(frozen=True)
class Matches:
    """Matched queries of p questions, padded to the largest number of pairs n. n may be 0.

    Attributes:
        student: Indices of student queries, 0 for padding. Within a question an index occurs once at most.
        teacher: Indices of teacher queries or of annotated objects, 0 for padding. They also occur once at most.
        valid: False for padding.
        aligned: Both detectors have the same queries in the same order, so a query without a pair has a counterpart.
    """

    student: Int[Tensor, "p n"]
    teacher: Int[Tensor, "p n"]
    valid: Bool[Tensor, "p n"]
    aligned: bool = False

    @property
    def pairs(self) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Int[Tensor, " m"]]:
        """Question, student query and teacher query of each of the m valid pairs, ordered by question."""
        question, slot = self.valid.nonzero(as_tuple=True)
        return question, self.student[question, slot], self.teacher[question, slot]

    def matched(self, queries: int) -> Bool[Tensor, "p q"]:
        """Tell which student queries are matched.

        Args:
            queries: Number q of student queries.

        Returns:
            A mask of shape (p, q).
        """
        question, student, _ = self.pairs
        found = torch.zeros(len(self.valid), queries, dtype=torch.bool, device=self.valid.device)
        found[question, student] = True
        return found


def _coverage(masks: Float[Tensor, "p q h w"], side: int) -> Float[Tensor, "p q s"]:
    """Average mask probabilities over the cells of a ``side`` x ``side`` grid.

    The mean of probabilities is the fraction of the cell that the mask covers, at any mask size. Logits are not
    averaged, because the most certain pixel dominates their mean and thin objects disappear.
    """
    return F.interpolate(masks.float(), (side, side), mode="area").flatten(2)


def _soft_iou(first: Float[Tensor, "p n s"], second: Float[Tensor, "p m s"]) -> Float[Tensor, "p n m"]:
    """Compute the soft IoU ab / (aa + bb - ab) of every pair. For binary masks it equals the IoU.

    It is 1 for two equal soft masks and for two empty masks. With plain sums in the denominator, a soft mask would be
    more similar to a binary mask than to itself.
    """
    overlap = first @ second.transpose(1, 2)
    union = first.square().sum(-1)[:, :, None] + second.square().sum(-1)[:, None] - overlap
    return (overlap + 1e-6) / (union + 1e-6)


def match_cost(student: DetectorOutput, teacher: DetectorOutput, cost: MatchCost) -> Float[Tensor, "p qs qt"]:
    """Compute the cost of matching every student query with every teacher query, in float32 also under autocast.

    The cost is the weighted sum of three terms: 1 - soft IoU of the mask probabilities; the L1 distance of the
    normalised xyxy boxes, summed over the four edges as in DETR; the absolute difference of the query probabilities.

    Args:
        student: The student's output for p questions, with qs queries.
        teacher: The teacher's output for the same questions, with qt queries.
        cost: Weights.

    Returns:
        Costs of shape (p, qs, qt).

    Raises:
        ValueError: The outputs have different numbers of questions.
    """
    if len(student.pred_logits) != len(teacher.pred_logits):
        raise ValueError(
            f"numbers of questions differ: student {len(student.pred_logits)}, target {len(teacher.pred_logits)}"
        )
    with torch.autocast(student.pred_masks.device.type, enabled=False):
        masks = (x.pred_masks.float().sigmoid() for x in (student, teacher))
        overlap = _soft_iou(*(_coverage(x, cost.resolution) for x in masks))
        boxes = torch.cdist(student.pred_boxes.float(), teacher.pred_boxes.float(), p=1)
        first, second = (x.pred_logits.float().sigmoid() for x in (student, teacher))
        scores = (first[:, :, None] - second[:, None]).abs()
        return cost.mask * (1 - overlap) + cost.box * boxes + cost.logit * scores


def truth_cost(student: DetectorOutput, truth: ObjectTruth, cost: MatchCost) -> Float[Tensor, "p qs n"]:
    """Compute the cost of matching every student query with every annotated object.

    It differs from ``match_cost`` in two terms. The masks of ``truth`` are already probabilities and get no sigmoid:
    with one, an empty mask would have the value 0.5 everywhere, and a mask that covers everything would be the best
    match. The score term is 1 - the query's probability.

    Args:
        student: The student's output for p questions, with qs queries.
        truth: n annotated objects per question, with padding.
        cost: Weights.

    Returns:
        Costs of shape (p, qs, n).

    Raises:
        ValueError: The numbers of questions differ.
    """
    if len(student.pred_logits) != len(truth.valid):
        raise ValueError(f"numbers of questions differ: student {len(student.pred_logits)}, target {len(truth.valid)}")
    with torch.autocast(student.pred_masks.device.type, enabled=False):
        masks = student.pred_masks.float().sigmoid(), truth.masks
        overlap = _soft_iou(*(_coverage(x, cost.resolution) for x in masks))
        boxes = torch.cdist(student.pred_boxes.float(), truth.boxes.float(), p=1)
        return (
            cost.mask * (1 - overlap)
            + cost.box * boxes
            + cost.logit * (1 - student.pred_logits.float().sigmoid())[..., None]
        )


def _assign(
    cost: Float[Tensor, "p qs qt"],
    allowed: Bool[Tensor, "p qt"],
    solve: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Matches:
    """Apply ``solve`` to each question's allowed columns, with one copy from the device and one back."""
    cost = torch.where(cost.isfinite(), cost.float(), VERY_EXPENSIVE)
    # From here on an infinite cost marks a pair that is not allowed, so one copy transfers both tensors.
    host = torch.where(allowed[:, None], cost, torch.inf).cpu().numpy()
    found = []
    for question in host:
        columns = np.flatnonzero(np.isfinite(question).all(0))
        rows, chosen = solve(question[:, columns])
        found.append((rows, columns[chosen]))
    most = max((len(rows) for rows, _ in found), default=0)
    packed = np.zeros((3, len(host), most), dtype=np.int64)
    for i, (rows, columns) in enumerate(found):
        packed[:, i, : len(rows)] = rows, columns, np.ones_like(rows)
    students, teachers, valid = torch.from_numpy(packed).to(cost.device)
    return Matches(students, teachers, valid.bool())


def _cheapest_first(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Select the pair of lowest cost again and again, each time without its row and column."""
    left, taken = cost.copy(), np.zeros((min(cost.shape), 2), dtype=np.int64)
    for pair in taken:
        pair[:] = row, column = divmod(int(left.argmin()), left.shape[1])
        left[row], left[:, column] = np.inf, np.inf
    return taken[:, 0], taken[:, 1]


@MATCHERS.register("hungarian")
def hungarian(cost: Float[Tensor, "p qs qt"], allowed: Bool[Tensor, "p qt"]) -> Matches:
    """Match so that the total cost is lowest. A question has min(qs, allowed teacher queries) pairs.

    Args:
        cost: Cost of every pair, of shape (p, qs, qt).
        allowed: Teacher queries that may be matched, of shape (p, qt).

    Source:
        Carion et al., End-to-End Object Detection with Transformers (DETR), 2020.
    """
    return _assign(cost, allowed, linear_sum_assignment)


@MATCHERS.register("greedy")
def greedy(cost: Float[Tensor, "p qs qt"], allowed: Bool[Tensor, "p qt"]) -> Matches:
    """Match the pair of lowest cost, then the cheapest pair of the remaining queries, and so on.

    A question has as many pairs as with ``hungarian``.

    Args:
        cost: Cost of every pair, of shape (p, qs, qt).
        allowed: Teacher queries that may be matched, of shape (p, qt).
    """
    return _assign(cost, allowed, _cheapest_first)


def same_index(allowed: Bool[Tensor, "p q"]) -> Matches:
    """Match every query with the teacher's query of the same index.

    Args:
        allowed: Queries that may be matched, of shape (p, q).

    Example:
        >>> same_index(torch.tensor([[True, False, True]])).pairs[1].tolist()
        [0, 2]
    """
    index = torch.arange(allowed.shape[1], device=allowed.device) * allowed
    return Matches(index, index, allowed, aligned=True)


@torch.no_grad()
def match(student: DetectorOutput, teacher: DetectorOutput, cost: MatchCost, method: str = "hungarian") -> Matches:
    """Match the queries of a student with the queries of a teacher.

    If the teacher has more queries than the student, only its queries with the highest scores are matched, as many as
    the student has. Otherwise the assignment would choose which ones to leave out, and it would leave out the
    detections, because the outputs of an untrained student are closer to the teacher's inactive queries.

    Args:
        student: The student's output for p questions.
        teacher: The teacher's output for the same questions.
        cost: Weights of the cost, and the lowest score of a teacher query.
        method: Name of a matcher in ``MATCHERS``, or ``index`` for queries that correspond by their index.

    Returns:
        The pairs. Queries beyond the smaller number of queries are not matched.

    Raises:
        ValueError: ``index``, and the numbers of queries differ.
    """
    scores = teacher.scores
    if method == INDEX:
        if student.pred_logits.shape != scores.shape:
            counts = tuple(student.pred_logits.shape), tuple(scores.shape)
            raise ValueError(f"queries correspond by index only if both models have the same: {counts}")
        return same_index(scores >= cost.floor)
    best = scores.topk(min(scores.shape[1], student.pred_logits.shape[1]), dim=1).indices
    allowed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True) & (scores >= cost.floor)
    return MATCHERS.get(method)(match_cost(student, teacher, cost), allowed)


@torch.no_grad()
def match_truth(student: DetectorOutput, truth: ObjectTruth, cost: MatchCost, method: str = "greedy") -> Matches:
    """Match the queries of a student with annotated objects.

    Args:
        student: The student's output for p questions.
        truth: The annotated objects of the same questions.
        cost: Weights of the cost.
        method: Name of a matcher in ``MATCHERS``.

    Returns:
        The pairs. ``Matches.teacher`` has the indices of objects. If there are more objects than queries, the rest are
        not matched.
    """
    return MATCHERS.get(method)(truth_cost(student, truth, cost), truth.valid)
