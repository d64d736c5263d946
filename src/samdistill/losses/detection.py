"""The terms that pull a student's concept detections towards a teacher's: six of the outputs, two of the features.

Every term is computed in float32 and attached to the student alone. A term is a mean over the questions of the batch
(``fpn``: over its images) of each question's own mean, so it averages over micro-batches and ranks. A question without
a pair contributes 0 to the terms of pairs; a batch without questions gives 0 everywhere, with a gradient of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..ops.matching import Matches
from ..types import DetectorOutput
from .box import box_giou, box_l1
from .mask import soft_mask_loss
from .pairs import mean, over_pairs, pick

OUTPUT_TERMS = ("mask", "box_l1", "giou", "logit", "presence", "semantic")
FEATURE_TERMS = ("fpn", "encoder")
TERMS = OUTPUT_TERMS + FEATURE_TERMS


def output_terms(
    student: DetectorOutput, teacher: DetectorOutput, matches: Matches, unmatched: bool = True
) -> dict[str, Float[Tensor, ""]]:
    """The terms of ``OUTPUT_TERMS``.

    mask, box_l1, giou: means over a question's pairs. mask and semantic: ``soft_mask_loss`` at the teacher's size.
    logit: cross-entropy against the probability of the query's partner; with ``unmatched`` the student's other queries
    take part and learn 0, "no object". presence: squared difference of probabilities.
    """
    if not len(student.pred_logits) == len(teacher.pred_logits) == len(matches.valid):
        counts = len(student.pred_logits), len(teacher.pred_logits), len(matches.valid)
        raise ValueError(f"student, teacher and matches answer {counts} questions")
    question, ours, theirs = matches.pairs
    boxes, wanted = pick(student.pred_boxes, question, ours), pick(teacher.pred_boxes.detach(), question, theirs)
    masks = pick(student.pred_masks, question, ours).float()
    target = pick(teacher.pred_masks.detach(), question, theirs).float().sigmoid_()  # of a copy: in place
    return {
        "mask": over_pairs(soft_mask_loss(_resize(masks[:, None], target)[:, 0], target), matches),
        "box_l1": over_pairs(box_l1(boxes, wanted), matches),
        "giou": over_pairs(box_giou(boxes, wanted), matches),
        "logit": _logit(student.pred_logits, teacher.pred_logits.detach(), matches, unmatched),
        "presence": _mse(student.presence_logits.float().sigmoid(), teacher.presence_logits.detach().float().sigmoid()),
        "semantic": _semantic(student.semantic_seg.float(), teacher.semantic_seg.detach().float().sigmoid()),
    }


def feature_terms(student: DetectorOutput, teacher: DetectorOutput) -> dict[str, Float[Tensor, ""]]:
    """The terms of ``FEATURE_TERMS``: squared error per element, the student's grid resized to the teacher's.

    ``ValueError`` for another number of levels, channels, images or questions.
    """
    return {"fpn": fpn_term(student.fpn, teacher.fpn), "encoder": _grid(student.encoder, teacher.encoder)}


def fpn_term(
    student: Sequence[Float[Tensor, "b c _ _"]], teacher: Sequence[Float[Tensor, "b c _ _"]]
) -> Float[Tensor, ""]:
    """Squared error per element of every level, averaged over the levels: the one term that needs no question."""
    return torch.stack([_grid(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]).mean()


def _logit(
    student: Float[Tensor, "p qs"], teacher: Float[Tensor, "p qt"], matches: Matches, unmatched: bool
) -> Float[Tensor, ""]:
    question, ours, theirs = matches.pairs
    target = torch.zeros_like(student, dtype=torch.float32)
    target[question, ours] = teacher[question, theirs].float().sigmoid()
    part = torch.ones_like(target, dtype=torch.bool) if unmatched else matches.matched(student.shape[1])
    logits = torch.where(part, student.float(), 0.0)  # before the loss: what takes no part must not spoil the gradient
    error = F.binary_cross_entropy_with_logits(logits, target, weight=part.float(), reduction="none")
    return mean(error.sum(1) / part.sum(1).clamp(min=1))


def _semantic(student: Float[Tensor, "p 1 h w"], target: Float[Tensor, "p 1 th tw"]) -> Float[Tensor, ""]:
    return mean(soft_mask_loss(_resize(student, target)[:, 0], target[:, 0]))


def _grid(student: Float[Tensor, "n c h w"], teacher: Float[Tensor, "n c th tw"]) -> Float[Tensor, ""]:
    return _mse(_resize(student.float(), teacher), teacher.detach().float())


def _mse(student: Float[Tensor, "n ..."], target: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    if student.shape != target.shape:  # broadcasting would hide a wrong layout
        raise ValueError(f"the student's {tuple(student.shape)} and the teacher's {tuple(target.shape)} do not match")
    return mean((student - target).square().flatten(1).mean(1))


def _resize(maps: Float[Tensor, "n c h w"], like: Float[Tensor, "*n th tw"]) -> Float[Tensor, "n c th tw"]:
    size = like.shape[-2:]
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)
