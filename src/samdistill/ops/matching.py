"""Which query of the student learns from which query of the teacher: one-to-one pairs of least cost."""

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

VERY_EXPENSIVE = 1e9
"""What a pair costs whose cost is not a finite number: it is taken last, and the loss then names the fault."""


@dataclass(frozen=True)
class MatchCost:
    """What makes a pair expensive.

    mask, box, logit: weights of the three costs. resolution: side in pixels at which masks are compared. floor: a
    teacher query that scores below it is no target.
    """

    mask: float = 2.0
    box: float = 5.0
    logit: float = 2.0
    resolution: int = 72
    floor: float = 0.0


@dataclass(frozen=True)
class Matches:
    """Pairs of queries for each of p questions, padded to the largest number of pairs: n, which may be 0.

    student, teacher: indices of queries; 0 where ``valid`` is False. Within a question no query occurs twice.
    """

    student: Int[Tensor, "p n"]
    teacher: Int[Tensor, "p n"]
    valid: Bool[Tensor, "p n"]

    @property
    def pairs(self) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Int[Tensor, " m"]]:
        """Question, student query and teacher query of each of the m valid pairs, question after question."""
        question, slot = self.valid.nonzero(as_tuple=True)
        return question, self.student[question, slot], self.teacher[question, slot]

    def matched(self, queries: int) -> Bool[Tensor, "p q"]:
        """Which of the student's ``queries`` have a partner."""
        question, student, _ = self.pairs
        found = torch.zeros(len(self.valid), queries, dtype=torch.bool, device=self.valid.device)
        found[question, student] = True
        return found


Matcher = Callable[[Float[Tensor, "p qs qt"], Bool[Tensor, "p qt"]], Matches]


def _coverage(masks: Float[Tensor, "p q h w"], side: int) -> Float[Tensor, "p q s"]:
    """Mean probability of each cell of a ``side`` x ``side`` grid; masks are probabilities.

    Probabilities are averaged, not logits: their mean is how much of the cell is covered, at any size of mask. The mean
    of logits is ruled by the most certain pixel and loses thin objects.
    """
    return F.interpolate(masks.float(), (side, side), mode="area").flatten(2)


def _soft_iou(first: Float[Tensor, "p n s"], second: Float[Tensor, "p m s"]) -> Float[Tensor, "p n m"]:
    """Of every pair: ab / (aa + bb - ab), the IoU of binary masks; 1 for a soft mask and itself and for two empty ones.

    With plain sums in the denominator a soft mask would be nearer to a certain one than to itself.
    """
    overlap = first @ second.transpose(1, 2)
    union = first.square().sum(-1)[:, :, None] + second.square().sum(-1)[:, None] - overlap
    return (overlap + 1e-6) / (union + 1e-6)


def match_cost(student: DetectorOutput, teacher: DetectorOutput, cost: MatchCost) -> Float[Tensor, "p qs qt"]:
    """Weighted sum of three costs, in float32 also under autocast.

    mask: 1 - soft IoU. box: L1 of the normalised xyxy boxes, summed over the four edges as in DETR. logit: difference
    of the query probabilities. ``ValueError`` where the two answer different numbers of questions.
    """
    if len(student.pred_logits) != len(teacher.pred_logits):
        raise ValueError(f"{len(student.pred_logits)} questions cannot be matched with {len(teacher.pred_logits)}")
    with torch.autocast(student.pred_masks.device.type, enabled=False):
        masks = (x.pred_masks.float().sigmoid() for x in (student, teacher))
        overlap = _soft_iou(*(_coverage(x, cost.resolution) for x in masks))
        boxes = torch.cdist(student.pred_boxes.float(), teacher.pred_boxes.float(), p=1)
        first, second = (x.pred_logits.float().sigmoid() for x in (student, teacher))
        scores = (first[:, :, None] - second[:, None]).abs()
        return cost.mask * (1 - overlap) + cost.box * boxes + cost.logit * scores


def truth_cost(student: DetectorOutput, truth: ObjectTruth, cost: MatchCost) -> Float[Tensor, "p qs n"]:
    """``match_cost`` against annotations, whose masks are shares already: a sigmoid of them would make an empty mask
    half full, and the mask that covers everything the best. logit: 1 - the query's probability.
    """
    if len(student.pred_logits) != len(truth.valid):
        raise ValueError(f"{len(student.pred_logits)} questions cannot be matched with {len(truth.valid)}")
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
    """``solve`` for each question over the teacher queries it allows; one copy from the device, one back."""
    cost = torch.where(cost.isfinite(), cost.float(), VERY_EXPENSIVE)
    # Infinite means not allowed from here on, so that one copy carries both.
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
    left, taken = cost.copy(), np.zeros((min(cost.shape), 2), dtype=np.int64)
    for pair in taken:
        pair[:] = row, column = divmod(int(left.argmin()), left.shape[1])
        left[row], left[:, column] = np.inf, np.inf
    return taken[:, 0], taken[:, 1]


@MATCHERS.register("hungarian")
def hungarian(cost: Float[Tensor, "p qs qt"], allowed: Bool[Tensor, "p qt"]) -> Matches:
    """The pairs of least total cost (Carion et al., DETR, 2020): min(qs, allowed teacher queries) of each question."""
    return _assign(cost, allowed, linear_sum_assignment)


@MATCHERS.register("greedy")
def greedy(cost: Float[Tensor, "p qs qt"], allowed: Bool[Tensor, "p qt"]) -> Matches:
    """As many pairs as ``hungarian``: the cheapest, then the cheapest of the queries that remain, and so on."""
    return _assign(cost, allowed, _cheapest_first)


@torch.no_grad()
def match(student: DetectorOutput, teacher: DetectorOutput, cost: MatchCost, method: str = "hungarian") -> Matches:
    """Pairs by a matcher of ``MATCHERS``; queries beyond the smaller side stay alone, on either side.

    Of a teacher with more queries than the student its best take part. Were all allowed, the assignment would choose
    whom to leave out, and leave out the detections: an untrained student is nearer to the teacher's idle queries.
    """
    scores = teacher.scores
    best = scores.topk(min(scores.shape[1], student.pred_logits.shape[1]), dim=1).indices
    allowed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True) & (scores >= cost.floor)
    return MATCHERS.get(method)(match_cost(student, teacher, cost), allowed)


@torch.no_grad()
def match_truth(student: DetectorOutput, truth: ObjectTruth, cost: MatchCost, method: str = "greedy") -> Matches:
    """A query for each annotated object, as far as there are queries; ``Matches.teacher`` counts the objects."""
    return MATCHERS.get(method)(truth_cost(student, truth, cost), truth.valid)
