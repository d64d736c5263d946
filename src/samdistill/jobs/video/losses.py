"""Loss terms of a video student's memory, between its answers about the query frame and the ground truth.

Every term is computed in float32 and averaged over the questions of the batch. A question without an object counts as 0
in the terms of pairs, and still trains ``iou`` and ``presence``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ...losses.box import box_giou, box_l1
from ...losses.maps import fpn_term
from ...losses.mask import soft_mask_loss
from ...losses.pairs import mean, over_pairs, pick
from ...ops.matching import Matches
from ...registry import TermTable
from ...types import DetectorOutput, ObjectTruth

ALIGN_TERMS = TermTable("term of remembered maps")
"""Functions of (own, teacher): maps (n, c, h, w) of the same size."""
MEMORY_TERMS = TermTable("term of video answers")
"""Functions of an ``Annotated``."""


@dataclass(frozen=True)
class Annotated:
    """Answers of a student, the ground truth, and the matched queries."""

    student: DetectorOutput
    truth: ObjectTruth
    matches: Matches

    @cached_property
    def boxes(self) -> tuple[Float[Tensor, "m 4"], Float[Tensor, "m 4"]]:
        """Boxes of each pair, of the student and of the ground truth."""
        question, ours, theirs = self.matches.pairs
        return pick(self.student.pred_boxes, question, ours), pick(self.truth.boxes, question, theirs)

    @cached_property
    def masks(self) -> tuple[Float[Tensor, "m h w"], Float[Tensor, "m h w"]]:
        """Masks of each pair: logits of the student, and the fraction of each cell that the object covers."""
        question, ours, theirs = self.matches.pairs
        masks = pick(self.student.pred_masks, question, ours).float()
        return masks, _resized(pick(self.truth.masks, question, theirs).float(), masks)


def video_terms(
    student: DetectorOutput, truth: ObjectTruth, matches: Matches, names: Sequence[str] = ()
) -> dict[str, Float[Tensor, ""]]:
    """Return terms of ``MEMORY_TERMS`` by name.

    Args:
        student: The student's outputs.
        truth: The ground truth.
        matches: Matches of the student's queries with the objects.
        names: Names of the terms; ``()`` for those with a default weight.

    Raises:
        ValueError: The numbers of questions differ.
    """
    if not len(student.pred_logits) == len(truth.valid) == len(matches.valid):
        counts = len(student.pred_logits), len(truth.valid), len(matches.valid)
        raise ValueError(f"student, annotations and matches answer {counts} questions")
    compared = Annotated(student, truth, matches)
    return {name: MEMORY_TERMS.get(name)(compared) for name in names or MEMORY_TERMS.weights}


@ALIGN_TERMS.term("align", 1.0)
def align(own: Float[Tensor, "n c h w"], teacher: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
    """Memory level of student and teacher, in a separate phase: squared error per element.

    The description does not have this phase, which precedes the training of the memory.
    """
    return fpn_term((own.float(),), (teacher,))


@MEMORY_TERMS.term("mask", 5.0)
def _mask(compared: Annotated) -> Float[Tensor, ""]:
    """Masks of a pair, at the student's size: Dice with squared denominators + BCE."""
    return over_pairs(soft_mask_loss(*compared.masks), compared.matches)


@MEMORY_TERMS.term("box_l1", 5.0)
def _box_l1(compared: Annotated) -> Float[Tensor, ""]:
    """Boxes of a pair, normalised xyxy: sum of the four absolute differences."""
    return over_pairs(box_l1(*compared.boxes), compared.matches)


@MEMORY_TERMS.term("giou", 2.0)
def _box_giou(compared: Annotated) -> Float[Tensor, ""]:
    """Boxes of a pair: 1 - generalised IoU."""
    return over_pairs(box_giou(*compared.boxes), compared.matches)


@MEMORY_TERMS.term("iou", 2.0)
def _query_iou(compared: Annotated) -> Float[Tensor, ""]:
    """Probability of every query, against the IoU of its mask with that of its matched object, or 0 without a match:
    squared error.

    Both masks are thresholded at one half.
    """
    (masks, target), logits = compared.masks, compared.student.pred_logits
    question, ours, _ = compared.matches.pairs
    true_iou = torch.zeros_like(logits, dtype=torch.float32)
    true_iou[question, ours] = _iou(masks.detach() > 0, target > 0.5)
    return mean((logits.float().sigmoid() - true_iou).square().mean(1))


@MEMORY_TERMS.term("presence", 1.0)
def _presence(compared: Annotated) -> Float[Tensor, ""]:
    """Presence of an object of the question in the frame: BCE."""
    there = compared.truth.valid.any(1, keepdim=True).float()
    logits = compared.student.presence_logits.float()
    return mean(F.binary_cross_entropy_with_logits(logits, there, reduction="none")[:, 0])


@MEMORY_TERMS.term("select", 5.0)
def _selection(compared: Annotated) -> Float[Tensor, ""]:
    """Each matched query against the unmatched ones: cross-entropy.

    The description does not have this term. Its ``iou`` is a mean over about a hundred queries, of which one has an
    object, and hardly trains which query to prefer.
    """
    return over_pairs(_select(compared.student.pred_logits.float(), compared.matches), compared.matches)


def _select(logits: Float[Tensor, "p q"], matches: Matches) -> Float[Tensor, " m"]:
    """Return the cross-entropy of each pair's query among the unmatched queries and itself."""
    question, ours, _ = matches.pairs
    rivals = logits.masked_fill(matches.matched(logits.shape[1]), torch.finfo(logits.dtype).min)
    return F.softplus(rivals.logsumexp(1)[question] - logits[question, ours])


def _resized(target: Float[Tensor, "m th tw"], like: Float[Tensor, "m h w"]) -> Float[Tensor, "m h w"]:
    """Resize by averaging over areas, so that values remain fractions of cells."""
    if target.shape[-2:] == like.shape[-2:]:
        return target
    return F.interpolate(target[:, None], like.shape[-2:], mode="area")[:, 0]


def _iou(predicted: Tensor, wanted: Tensor) -> Float[Tensor, " m"]:
    """Return the IoU of boolean masks (m, h, w).

    It is 0 if both are empty: an object that is too small for the grid counts as missed.
    """
    overlap, union = (predicted & wanted).flatten(1).sum(1), (predicted | wanted).flatten(1).sum(1)
    return overlap / union.clamp(min=1)
