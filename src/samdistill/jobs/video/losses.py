"""The terms that train a video student's memory: its answers about the current frame against what is annotated there.

Every term is computed in float32 and is a mean over the questions of the batch. A question without an object
contributes 0 to the terms of pairs, and still teaches ``iou`` and ``presence``.
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
"""Functions of (own, teacher): maps (n, c, h, w) of one size."""
MEMORY_TERMS = TermTable("term of video answers")
"""Functions of an ``Annotated``."""


@dataclass(frozen=True)
class Annotated:
    """A student's answers, what is annotated, and which queries are paired with which objects."""

    student: DetectorOutput
    truth: ObjectTruth
    matches: Matches

    @cached_property
    def boxes(self) -> tuple[Float[Tensor, "m 4"], Float[Tensor, "m 4"]]:
        """Of each pair: the student's and the annotated one."""
        question, ours, theirs = self.matches.pairs
        return pick(self.student.pred_boxes, question, ours), pick(self.truth.boxes, question, theirs)

    @cached_property
    def masks(self) -> tuple[Float[Tensor, "m h w"], Float[Tensor, "m h w"]]:
        """Of each pair: the student's logits, and the share of each cell that the object covers."""
        question, ours, theirs = self.matches.pairs
        masks = pick(self.student.pred_masks, question, ours).float()
        return masks, _resized(pick(self.truth.masks, question, theirs).float(), masks)


def video_terms(
    student: DetectorOutput, truth: ObjectTruth, matches: Matches, names: Sequence[str] = ()
) -> dict[str, Float[Tensor, ""]]:
    """The terms of ``MEMORY_TERMS`` that are called ``names``; ``()`` takes those that every run has.

    matches: of the student's queries with the objects. Raises ``ValueError`` where the three answer different numbers
    of questions.
    """
    if not len(student.pred_logits) == len(truth.valid) == len(matches.valid):
        counts = len(student.pred_logits), len(truth.valid), len(matches.valid)
        raise ValueError(f"student, annotations and matches answer {counts} questions")
    compared = Annotated(student, truth, matches)
    return {name: MEMORY_TERMS.get(name)(compared) for name in names or MEMORY_TERMS.weights}


@ALIGN_TERMS.term("align", 1.0)
def align(own: Float[Tensor, "n c h w"], teacher: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
    """The remembered level of student and teacher, in a phase of its own: squared error per element.

    The description lacks this phase, which comes before the memory is trained.
    """
    return fpn_term((own.float(),), (teacher,))


@MEMORY_TERMS.term("mask", 5.0)
def _mask(compared: Annotated) -> Float[Tensor, ""]:
    """Masks of a pair, at the student's size: Dice with squared denominators + BCE."""
    return over_pairs(soft_mask_loss(*compared.masks), compared.matches)


@MEMORY_TERMS.term("box_l1", 5.0)
def _box_l1(compared: Annotated) -> Float[Tensor, ""]:
    """Boxes of a pair, normalised corners: sum of the four absolute differences."""
    return over_pairs(box_l1(*compared.boxes), compared.matches)


@MEMORY_TERMS.term("giou", 2.0)
def _box_giou(compared: Annotated) -> Float[Tensor, ""]:
    """Boxes of a pair: 1 - generalised IoU."""
    return over_pairs(box_giou(*compared.boxes), compared.matches)


@MEMORY_TERMS.term("iou", 2.0)
def _query_iou(compared: Annotated) -> Float[Tensor, ""]:
    """Probability of every query, with the IoU of its mask and its partner's, or 0 without a partner: squared error.

    Both masks are cut at one half.
    """
    (masks, target), logits = compared.masks, compared.student.pred_logits
    question, ours, _ = compared.matches.pairs
    true_iou = torch.zeros_like(logits, dtype=torch.float32)
    true_iou[question, ours] = _iou(masks.detach() > 0, target > 0.5)
    return mean((logits.float().sigmoid() - true_iou).square().mean(1))


@MEMORY_TERMS.term("presence", 1.0)
def _presence(compared: Annotated) -> Float[Tensor, ""]:
    """Whether any object of the question is in the frame: BCE."""
    there = compared.truth.valid.any(1, keepdim=True).float()
    logits = compared.student.presence_logits.float()
    return mean(F.binary_cross_entropy_with_logits(logits, there, reduction="none")[:, 0])


@MEMORY_TERMS.term("select", 5.0)
def _selection(compared: Annotated) -> Float[Tensor, ""]:
    """Each matched query against the unmatched ones: cross-entropy.

    The description lacks it; its ``iou`` is a mean over a hundred queries of which one has an object, and hardly says
    which one to prefer.
    """
    return over_pairs(_select(compared.student.pred_logits.float(), compared.matches), compared.matches)


def _select(logits: Float[Tensor, "p q"], matches: Matches) -> Float[Tensor, " m"]:
    """How surely each pair's query beats the queries without a pair; those with one do not compete."""
    question, ours, _ = matches.pairs
    rivals = logits.masked_fill(matches.matched(logits.shape[1]), torch.finfo(logits.dtype).min)
    return F.softplus(rivals.logsumexp(1)[question] - logits[question, ours])


def _resized(target: Float[Tensor, "m th tw"], like: Float[Tensor, "m h w"]) -> Float[Tensor, "m h w"]:
    """Shares of cells stay shares: means over areas."""
    if target.shape[-2:] == like.shape[-2:]:
        return target
    return F.interpolate(target[:, None], like.shape[-2:], mode="area")[:, 0]


def _iou(said: Tensor, wanted: Tensor) -> Float[Tensor, " m"]:
    """Of boolean masks (m, h, w); 0 where both are empty: a thing too small for the grid is missed."""
    overlap, union = (said & wanted).flatten(1).sum(1), (said | wanted).flatten(1).sum(1)
    return overlap / union.clamp(min=1)
