"""Loss terms between a student's concept detections and the annotated objects of the same questions.

Annotations have no queries, so the student's queries are matched with the objects at the lowest total cost. Every term
is computed in float32. ``label_presence`` is a mean over the questions with labels. The other terms are means over the
questions with an object: first over the pairs or the queries of each question, then over the questions. Without any
such question a term is 0, with a zero gradient.

Source of the weights and formulas, where a term says no other: SAM 3's training code (facebookresearch/sam3,
``sam3/train/loss/loss_fns.py`` and ``configs/roboflow_v100``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ...losses.box import box_giou, box_l1
from ...losses.maps import resized
from ...losses.mask import soft_dice, soft_focal
from ...losses.pairs import mean, over_pairs, pick
from ...ops.boxes import iou
from ...ops.matching import MatchCost, Matches, match_truth
from ...registry import TermTable
from ...types import DetectorOutput, ObjectTruth, QuestionLabels

LABEL_TERMS = TermTable("term of labels")
"""Functions of a ``Labelled``. All are off by default."""
OBJECT_WEIGHT, OBJECT_POWER, LEAST, FOCUS = 10.0, 0.25, 0.01, 2.0
"""Of ``label_score``: weight of a matched query, power of its probability in its target, least target, focal power."""


@dataclass(frozen=True)
class Labelled:
    """Answers of a student, labels of the same questions, and the matched queries.

    Attributes:
        student: The student's outputs.
        labels: The labels.
        matches: Matches of the student's queries with the annotated objects.
    """

    student: DetectorOutput
    labels: QuestionLabels
    matches: Matches

    @property
    def shown(self) -> Bool[Tensor, " p"]:
        """Whether a question has an object with a mask."""
        return self.labels.valid.any(1)

    @cached_property
    def boxes(self) -> tuple[Float[Tensor, "m 4"], Float[Tensor, "m 4"]]:
        """Boxes of each pair, of the student and of the object."""
        question, ours, theirs = self.matches.pairs
        return pick(self.student.pred_boxes, question, ours), pick(self.labels.boxes, question, theirs)

    @cached_property
    def masks(self) -> tuple[Float[Tensor, "m s s"], Float[Tensor, "m s s"]]:
        """Masks of each pair, at the labels' size: logits of the student, and the share of each cell that is in it."""
        question, ours, theirs = self.matches.pairs
        number = self.labels.valid.flatten().cumsum(0).view(self.labels.valid.shape) - 1
        target = self.labels.masks[number[question, theirs]].float() / 255
        masks = pick(self.student.pred_masks, question, ours).float()
        return resized(masks[:, None], target)[:, 0], target

    def over_objects(self, per_pair: Float[Tensor, " m"]) -> Float[Tensor, ""]:
        """Average over the pairs of each question, then over the questions with an object."""
        return over_pairs(per_pair, self.matches, self.shown)


def label_terms(
    student: DetectorOutput, labels: QuestionLabels, cost: MatchCost, names: Sequence[str]
) -> dict[str, Float[Tensor, ""]]:
    """Return terms of ``LABEL_TERMS`` by name.

    Args:
        student: The student's outputs.
        labels: The labels of the same questions.
        cost: Weights of the matching cost.
        names: Names of the terms.

    Raises:
        ValueError: The numbers of questions differ.
    """
    matches = match_truth(student, coarse_truth(labels, cost.resolution), cost, "hungarian")
    compared = Labelled(student, labels, matches)
    return {name: LABEL_TERMS.get(name)(compared) for name in names}


def label_counts(labels: QuestionLabels, names: Sequence[str]) -> dict[str, int]:
    """Return the number of questions that each term is a mean of."""
    shown, known = int(labels.valid.any(1).sum()), int(labels.known.sum())
    return {name: known if name == "label_presence" else shown for name in names}


def coarse_truth(labels: QuestionLabels, side: int) -> ObjectTruth:
    """Return the objects with masks of at most ``side`` cells in each direction, as the matching compares them."""
    masks = labels.masks[:, None].float() / 255
    side = min(side, masks.shape[-1])
    padded = masks.new_zeros(*labels.valid.shape, side, side)
    if len(masks):  # an empty batch cannot be resized
        padded[labels.valid] = F.interpolate(masks, (side, side), mode="area")[:, 0]
    return ObjectTruth(padded, labels.boxes, labels.valid)


@LABEL_TERMS.optional("label_mask", 200.0)
def _mask(compared: Labelled) -> Float[Tensor, ""]:
    """Mask of a matched query and of its object: focal loss with gamma 2 and alpha 0.25, mean over pixels."""
    masks, target = compared.masks
    return compared.over_objects(soft_focal(masks, target, 2.0, 0.25).flatten(1).mean(1))


@LABEL_TERMS.optional("label_dice", 10.0)
def _dice(compared: Labelled) -> Float[Tensor, ""]:
    """The same masks: sum (p - t)^2 / (sum p^2 + sum t^2 + 1).

    The published Dice has plain denominators. Its minimum is not at a target between 0 and 1, as cells at an edge have.
    """
    masks, target = compared.masks
    return compared.over_objects(soft_dice(masks.sigmoid().flatten(1), target.flatten(1)))


@LABEL_TERMS.optional("label_box_l1", 5.0)
def _box_l1(compared: Labelled) -> Float[Tensor, ""]:
    """Box of a matched query and of its object, normalised xyxy: sum of the four absolute differences.

    DETR and SAM 3 have the same weight for cxcywh.
    """
    return compared.over_objects(box_l1(*compared.boxes))


@LABEL_TERMS.optional("label_giou", 2.0)
def _box_giou(compared: Labelled) -> Float[Tensor, ""]:
    """The same boxes: 1 - generalised IoU."""
    return compared.over_objects(box_giou(*compared.boxes))


@LABEL_TERMS.optional("label_score", 20.0)
def _score(compared: Labelled) -> Float[Tensor, ""]:
    """Probability p of each query: 10 BCE(p, t) with t = p^0.25 IoU^0.75 of the boxes if matched, else p^2 BCE(p, 0).

    t is at least 0.01 and has no gradient. Questions without an object are left to ``label_presence``. An unmatched
    query costs nothing where not all objects of the question are annotated.
    """
    logits = compared.student.pred_logits.float()
    question, ours, _ = compared.matches.pairs
    probability = logits.detach().sigmoid()
    overlap = iou(*(boxes.detach() for boxes in compared.boxes))
    wanted = probability[question, ours] ** OBJECT_POWER * overlap ** (1 - OBJECT_POWER)
    matched = compared.matches.matched(logits.shape[1])
    target = torch.zeros_like(logits).index_put((question, ours), wanted.clamp(min=LEAST))
    rest = soft_focal(logits, torch.zeros_like(logits), FOCUS) * compared.labels.complete[:, None]
    found = OBJECT_WEIGHT * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return mean(torch.where(matched, found, rest).mean(1)[compared.shown])


@LABEL_TERMS.optional("label_presence", 10.0)
def _presence(compared: Labelled) -> Float[Tensor, ""]:
    """Presence of the concept: BCE(p, 1) if an object is in the image, else BCE(p, 0).

    The published weight is 20, of half the cross-entropy.
    """
    logits, there = compared.student.presence_logits[:, 0].float(), compared.labels.present.float()
    error = F.binary_cross_entropy_with_logits(logits, there, reduction="none")
    return mean(error[compared.labels.known])
