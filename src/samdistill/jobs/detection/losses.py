"""Loss terms between the concept detections of a student and a teacher: of outputs and of features.

Every term is computed in float32, and only the student gets a gradient. A term is first averaged within each question,
then over the questions of the batch (``fpn`` and ``trunk``: over its images). A question without matched pairs counts
as 0 in the terms of pairs. A batch without questions gives 0 for every term, with a zero gradient.
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
from ...losses.maps import fpn_term, grid_error, resized, squared_error
from ...losses.mask import soft_mask_loss
from ...losses.pairs import mean, over_pairs, pick
from ...ops.matching import Matches
from ...registry import TermTable
from ...types import DetectorOutput

OUTPUT_TERMS = TermTable("term of detector outputs")
"""Functions of a ``Compared``."""
FEATURE_TERMS = TermTable("term of detector features")
"""Functions of (student, teacher)."""


@dataclass(frozen=True)
class Compared:
    """Answers of two detectors to the same questions, and the matched queries.

    Attributes:
        student: The student's outputs.
        teacher: The teacher's outputs.
        matches: Matched queries.
        unmatched: Include the student's unmatched queries in the term ``logit``.
    """

    student: DetectorOutput
    teacher: DetectorOutput
    matches: Matches
    unmatched: bool = True

    @cached_property
    def boxes(self) -> tuple[Float[Tensor, "m 4"], Float[Tensor, "m 4"]]:
        """Boxes of each pair, of the student and of the teacher."""
        question, ours, theirs = self.matches.pairs
        return pick(self.student.pred_boxes, question, ours), pick(self.teacher.pred_boxes.detach(), question, theirs)

    @cached_property
    def masks(self) -> tuple[Float[Tensor, "m h w"], Float[Tensor, "m th tw"]]:
        """Masks of each pair: logits of the student and probabilities of the teacher."""
        question, ours, theirs = self.matches.pairs
        masks = pick(self.student.pred_masks, question, ours).float()
        return masks, pick(self.teacher.pred_masks.detach(), question, theirs).float().sigmoid_()  # in place, on a copy


def output_terms(
    student: DetectorOutput, teacher: DetectorOutput, matches: Matches, unmatched: bool = True,
    names: Sequence[str] = (),
) -> dict[str, Float[Tensor, ""]]:  # fmt: skip
    """Return terms of ``OUTPUT_TERMS`` by name.

    Args:
        student: The student's outputs.
        teacher: The teacher's outputs.
        matches: Matched queries.
        unmatched: Include the student's unmatched queries in ``logit``.
        names: Names of the terms; ``()`` for those with a default weight.

    Raises:
        ValueError: The numbers of questions differ.
    """
    if not len(student.pred_logits) == len(teacher.pred_logits) == len(matches.valid):
        counts = len(student.pred_logits), len(teacher.pred_logits), len(matches.valid)
        raise ValueError(f"student, teacher and matches answer {counts} questions")
    compared = Compared(student, teacher, matches, unmatched)
    return {name: OUTPUT_TERMS.get(name)(compared) for name in names or OUTPUT_TERMS.weights}


def feature_terms(
    student: DetectorOutput, teacher: DetectorOutput, names: Sequence[str] = ()
) -> dict[str, Float[Tensor, ""]]:
    """Return terms of ``FEATURE_TERMS`` by name.

    Args:
        student: The student's features.
        teacher: The teacher's features.
        names: Names of the terms; ``()`` for those with a default weight.

    Raises:
        ValueError: The numbers of levels, channels, images or questions differ.
    """
    return {name: FEATURE_TERMS.get(name)(student, teacher) for name in names or FEATURE_TERMS.weights}


@OUTPUT_TERMS.term("mask", 5.0)
def _mask(compared: Compared) -> Float[Tensor, ""]:
    """Masks of a pair, at the teacher's size: sum (p - t)^2 / (sum p^2 + sum t^2 + 1) + BCE(p, t)."""
    masks, target = compared.masks
    return over_pairs(soft_mask_loss(resized(masks[:, None], target)[:, 0], target), compared.matches)


@OUTPUT_TERMS.term("box_l1", 5.0)
def _box_l1(compared: Compared) -> Float[Tensor, ""]:
    """Boxes of a pair, normalised xyxy: sum of the four absolute differences."""
    return over_pairs(box_l1(*compared.boxes), compared.matches)


@OUTPUT_TERMS.term("giou", 2.0)
def _box_giou(compared: Compared) -> Float[Tensor, ""]:
    """Boxes of a pair: 1 - generalised IoU."""
    return over_pairs(box_giou(*compared.boxes), compared.matches)


@OUTPUT_TERMS.term("logit", 2.0)
def _pair_logit(compared: Compared) -> Float[Tensor, ""]:
    """Probability of each query: BCE(p, t); t = 0 for an unmatched query, which ``loss.unmatched=false`` leaves out.

    Queries that correspond by index keep their own t, also below ``match.floor``.
    """
    target = query_targets(compared.student, compared.teacher, compared.matches)
    return _logit(compared.student.pred_logits, target, compared.matches, compared.unmatched)


@OUTPUT_TERMS.term("presence", 1.0)
def _presence(compared: Compared) -> Float[Tensor, ""]:
    """Presence of the concept: (p - t)^2."""
    ours, theirs = compared.student.presence_logits, compared.teacher.presence_logits.detach()
    return squared_error(ours.float().sigmoid(), theirs.float().sigmoid())


@OUTPUT_TERMS.register("presence_bce")
def _presence_cross_entropy(compared: Compared) -> Float[Tensor, ""]:
    """Presence of the concept: BCE(p, t)."""
    ours, theirs = compared.student.presence_logits, compared.teacher.presence_logits.detach()
    error = F.binary_cross_entropy_with_logits(ours.float(), theirs.float().sigmoid(), reduction="none")
    return mean(error[:, 0])


@OUTPUT_TERMS.term("semantic", 2.0)
def _semantic_map(compared: Compared) -> Float[Tensor, ""]:
    """Mask of all instances together: same as ``mask``."""
    return _semantic(compared.student.semantic_seg.float(), compared.teacher.semantic_seg.detach().float().sigmoid())


@FEATURE_TERMS.term("fpn", 1.0)
def _fpn(student: DetectorOutput, teacher: DetectorOutput) -> Float[Tensor, ""]:
    """FPN levels, at the teacher's size: squared error per element, mean over levels."""
    return fpn_term(student.fpn, teacher.fpn)


@FEATURE_TERMS.term("encoder", 1.0)
def _encoder(student: DetectorOutput, teacher: DetectorOutput) -> Float[Tensor, ""]:
    """Output of the DETR encoder, at the teacher's size: squared error per element."""
    return grid_error(student.encoder, teacher.encoder)


@FEATURE_TERMS.register("trunk")
def _trunk(student: DetectorOutput, teacher: DetectorOutput) -> Float[Tensor, ""]:
    """Output of a hosted student's trunk and of the ViT: squared error per element."""
    assert student.trunk is not None and teacher.trunk is not None  # the configuration refuses other students
    return grid_error(student.trunk, teacher.trunk)


def query_targets(student: DetectorOutput, teacher: DetectorOutput, matches: Matches) -> Float[Tensor, "p qs"]:
    """Return the probability of each of the student's queries that the teacher wants, without gradient.

    It is that of the matched query. A query without a match has 0, or its own one where queries correspond by index.
    """
    question, ours, theirs = matches.pairs
    wanted = teacher.pred_logits.detach().float().sigmoid()
    target = wanted.clone() if matches.aligned else torch.zeros_like(student.pred_logits, dtype=torch.float32)
    target[question, ours] = wanted[question, theirs]
    return target


def _logit(
    student: Float[Tensor, "p q"], target: Float[Tensor, "p q"], matches: Matches, unmatched: bool
) -> Float[Tensor, ""]:
    part = torch.ones_like(target, dtype=torch.bool) if unmatched else matches.matched(student.shape[1])
    logits = torch.where(part, student.float(), 0.0)  # before the loss, because 0 * inf is NaN
    error = F.binary_cross_entropy_with_logits(logits, target, weight=part.float(), reduction="none")
    return mean(error.sum(1) / part.sum(1).clamp(min=1))


def _semantic(student: Float[Tensor, "p 1 h w"], target: Float[Tensor, "p 1 th tw"]) -> Float[Tensor, ""]:
    return mean(soft_mask_loss(resized(student, target)[:, 0], target[:, 0]))
