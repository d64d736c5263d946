"""The terms that train a video student's memory: its answers about the current frame against what is annotated there.

Every term is computed in float32 and is a mean over the questions of the batch. A question without an object
contributes 0 to the terms of pairs, and still teaches ``iou`` and ``presence``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..ops.matching import Matches
from ..types import DetectorOutput, ObjectTruth
from .box import box_giou, box_l1
from .mask import soft_mask_loss
from .pairs import mean, over_pairs, pick

TERMS = ("mask", "box_l1", "giou", "iou", "presence", "select")


def video_terms(student: DetectorOutput, truth: ObjectTruth, matches: Matches) -> dict[str, Float[Tensor, ""]]:
    """The terms of ``TERMS``; matches: of the student's queries with the objects.

    mask: Dice + cross-entropy of the pairs, at the student's size. box_l1, giou: of the pairs. iou: squared error of
    every query's probability: against the IoU its mask has with its partner's, both cut at one half, and against 0
    where it has none. presence: cross-entropy of "any object here". select: cross-entropy of each partner against the
    queries that have none. The description lacks it; its ``iou`` is a mean over a hundred queries of which one has an
    object, and hardly says which one to prefer. Raises ``ValueError`` where the three answer different numbers of
    questions.
    """
    if not len(student.pred_logits) == len(truth.valid) == len(matches.valid):
        counts = len(student.pred_logits), len(truth.valid), len(matches.valid)
        raise ValueError(f"student, annotations and matches answer {counts} questions")
    question, ours, theirs = matches.pairs
    boxes, wanted = pick(student.pred_boxes, question, ours), pick(truth.boxes, question, theirs)
    masks = pick(student.pred_masks, question, ours).float()
    target = _resized(pick(truth.masks, question, theirs).float(), masks)
    true_iou = torch.zeros_like(student.pred_logits, dtype=torch.float32)
    true_iou[question, ours] = _iou(masks.detach() > 0, target > 0.5)
    error = (student.pred_logits.float().sigmoid() - true_iou).square().mean(1)
    there = truth.valid.any(1, keepdim=True).float()
    presence = F.binary_cross_entropy_with_logits(student.presence_logits.float(), there, reduction="none")[:, 0]
    return {
        "mask": over_pairs(soft_mask_loss(masks, target), matches),
        "box_l1": over_pairs(box_l1(boxes, wanted), matches),
        "giou": over_pairs(box_giou(boxes, wanted), matches),
        "iou": mean(error),
        "presence": mean(presence),
        "select": over_pairs(_select(student.pred_logits.float(), matches), matches),
    }


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
