"""Terms of prompt distillation: four between signals of student and teacher, four against ground-truth masks.

The distillation terms and their defaults are those of the published point, box and mixed fine-tuning of MobileSAM. Each
is a mean over channels, cells or pixels and does not depend on the image size. Values are per image or per object; the
caller averages them. Terms are computed in float32. The teacher's tensors get no gradient. If the resolutions differ,
the teacher's tensors are resized to the student's, bilinearly. Other differences of shapes raise ``ValueError``.

``inside`` marks the cells or pixels on the image. Padding affects neither value nor gradient. An image without such a
cell gives 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ...losses.maps import directions
from ...losses.mask import soft_dice, soft_focal
from ...registry import TermTable

DISTILLED_TERMS = TermTable("distillation term")
TASK_TERMS = TermTable("task term")
"""Functions of a ``Segmented`` with a value per object and mask."""
OF_ALL_MASKS = ("iou",)
"""Task terms of all masks of a prompt. The others train only the best mask."""
FOCAL_TO_DICE = 20.0
"""Ratio of focal to Dice loss in the selection of the best mask, as in SAM's loss (Kirillov et al., 2023)."""


@DISTILLED_TERMS.term("encoder_patch", 1.0)
def encoder_patch(
    f_s: Float[Tensor, "b c h w"], f_t: Float[Tensor, "b c th tw"], w_l2: float, w_cos: float,
    inside: Bool[Tensor, "b h w"] | None = None,
) -> Float[Tensor, " b"]:  # fmt: skip
    """Features of the image encoders before their necks: ``w_l2`` MSE + ``w_cos`` (1 - cosine).

    The squared error is averaged over channels, the cosine is over the channels of a cell. The cosine with a vector
    shorter than 1e-6 is 0 without gradient.
    """
    f_s, f_t = _prepared(f_s, f_t, inside)
    error = (f_s - f_t).square().mean(1)
    return _cell_mean(w_l2 * error + w_cos * (1 - (directions(f_s) * directions(f_t)).sum(1)), inside)


@DISTILLED_TERMS.term("prompt_embed", 1.0)
def prompt_embed(
    f_s: Float[Tensor, "g k c h w"], f_t: Float[Tensor, "g k c th tw"], w_mse: float, w_cos: float
) -> Float[Tensor, "g k"]:
    """Image embedding plus dense prompt embedding, the input of the first two-way block, normalised over channels:
    ``w_mse`` MSE + ``w_cos`` (1 - cosine).

    The squared error of unit vectors is 2 (1 - cosine) / c, so the first part is the second one on a smaller scale.
    With 256 channels and equal weights it adds less than 1%. The published formula has both.
    """
    _same_but_grid(f_s, f_t)
    g, k = f_s.shape[:2]
    u_s, u_t = (directions(f) for f in _prepared(f_s.flatten(0, 1), f_t.flatten(0, 1)))
    cells = w_mse * (u_s - u_t).square().mean(1) + w_cos * (1 - (u_s * u_t).sum(1))
    return _cell_mean(cells).view(g, k)


@DISTILLED_TERMS.term("decoder_mask_token", 1.0)
def mask_token(
    z_s: Float[Tensor, "g n t c"], z_t: Float[Tensor, "g n t c"], w_kl: float, temperature: float
) -> Float[Tensor, "g n"]:
    """The four mask tokens after the two-way transformer: ``w_kl`` KL of softmax(z / T) over channels, mean over the
    tokens.

    The divergence is from the teacher to the student. It lacks the factor T^2 that makes gradients comparable between
    temperatures (Hinton et al., 2015, section 2). Near equality they are 1 / T^2 of those at T = 1, which is four times
    as large for T = 0.5. ``w_kl`` can compensate for this.
    """
    if z_s.shape != z_t.shape:
        raise ValueError(f"mask tokens {tuple(z_s.shape)} of the student and {tuple(z_t.shape)} of the teacher")
    ours, theirs = (F.log_softmax(z.float() / temperature, -1) for z in (z_s, z_t.detach()))
    return w_kl * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean(-1)


@DISTILLED_TERMS.term("dense_mask_logits", 1.0)
def dense_masks(
    logits_s: Float[Tensor, "g n m h w"], logits_t: Float[Tensor, "g n m th tw"], w_kl: float, w_focal: float,
    gamma: float, inside: Bool[Tensor, "g h w"] | None = None,
) -> Float[Tensor, "g n"]:  # fmt: skip
    """Logits of the masks (``low_res_masks``): ``w_kl`` Bernoulli KL + ``w_focal`` focal, mean over the pixels of a
    mask, then over the masks.

    p is the sigmoid of a logit. KL(p_t || p_s) is the divergence of two Bernoulli distributions. The focal loss is
    ``soft_focal`` without class balance. Both are 0 if the student equals the teacher.
    """
    _same_but_grid(logits_s, logits_t)
    shape = logits_s.shape
    ours, theirs = _prepared(logits_s.flatten(1, 2), logits_t.flatten(1, 2), inside)
    probability = theirs.sigmoid()
    divergence = _bernoulli_kl(theirs, ours)
    values = w_kl * divergence + w_focal * soft_focal(ours, probability, gamma)
    return _cell_mean(values, None if inside is None else inside[:, None]).view(shape[:3]).mean(-1)


def _bernoulli_kl(first: Float[Tensor, "*n"], second: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return the KL divergence of Bernoulli distributions given by logits. It is finite, and 0 for equal logits."""
    yes = first.sigmoid() * (F.logsigmoid(first) - F.logsigmoid(second))
    no = (-first).sigmoid() * (F.logsigmoid(-first) - F.logsigmoid(-second))
    return yes + no


def task_terms(
    logits: Float[Tensor, "g n m h w"], iou: Float[Tensor, "g n m"], target: Float[Tensor, "g n h w"], gamma: float,
    alpha: float, inside: Bool[Tensor, "g h w"] | None = None, names: Sequence[str] = (),
) -> dict[str, Float[Tensor, "g n"]]:  # fmt: skip
    """Return terms of ``TASK_TERMS`` for each object, by name.

    The terms ``bce`` and ``focal`` are means over pixels. If a prompt has several masks, these and ``dice`` train only
    the mask with the smallest 20 focal + dice, so that the others can represent other objects (SAM, "resolving
    ambiguity"). ``iou`` is the squared error of the predicted IoU of every mask. The true IoU compares masks at a
    threshold of one half. It trains all masks, because the prediction selects among them and must be low for wrong
    ones.

    Args:
        logits: Mask logits of the student.
        iou: Predicted IoUs of the student.
        target: Fraction of each pixel that the object covers, 0..1.
        gamma: Exponent of the focal loss.
        alpha: Class balance of the focal loss.
        inside: Pixels on the image; None for all.
        names: Names of the terms; ``()`` for those with a default weight.
    """
    (g, n, m), size = logits.shape[:3], logits.shape[3:]
    if iou.shape != (g, n, m) or target.shape != (g, n, *size) or (inside is not None and inside.shape != (g, *size)):
        shapes = [None if x is None else tuple(x.shape) for x in (logits, iou, target, inside)]
        raise ValueError(f"logits, IoU, target and inside do not match: {shapes}")
    pixels = None if inside is None else inside[:, None, None]
    logits, target = logits.float(), target.float()[:, :, None].expand(logits.shape)
    if pixels is not None:
        logits, target = torch.where(pixels, logits, 0.0), torch.where(pixels, target, 0.0)
    probability = logits.sigmoid() if pixels is None else torch.where(pixels, logits.sigmoid(), 0.0)
    answer = Segmented(logits, probability, iou.float(), target, pixels, gamma, alpha)
    wanted = names or tuple(TASK_TERMS.weights)
    values = {name: TASK_TERMS.get(name)(answer) for name in wanted if name not in OF_ALL_MASKS}
    focal, dice = (values[name] if name in values else TASK_TERMS.get(name)(answer) for name in ("focal", "dice"))
    best = (FOCAL_TO_DICE * focal + dice).detach().argmin(-1, keepdim=True)
    found = {name: value.gather(-1, best).squeeze(-1) for name, value in values.items()}
    return found | {name: TASK_TERMS.get(name)(answer).mean(-1) for name in wanted if name in OF_ALL_MASKS}


@dataclass(frozen=True)
class Segmented:
    """Predicted masks of prompted objects, and their targets. Values outside of ``pixels`` are 0.

    Attributes:
        logits: Mask logits.
        probability: Their sigmoid.
        iou: Predicted IoUs.
        target: Fraction of each pixel that the object covers.
        pixels: Pixels on the image; None for all.
        gamma: Exponent of the focal loss.
        alpha: Class balance of the focal loss.
    """

    logits: Float[Tensor, "g n m h w"]
    probability: Float[Tensor, "g n m h w"]
    iou: Float[Tensor, "g n m"]
    target: Float[Tensor, "g n m h w"]
    pixels: Bool[Tensor, "g 1 1 h w"] | None
    gamma: float
    alpha: float


@TASK_TERMS.term("bce", 0.0)
def _bce(answer: Segmented) -> Float[Tensor, "g n m"]:
    """Each pixel: cross-entropy, mean over pixels."""
    error = F.binary_cross_entropy_with_logits(answer.logits, answer.target, reduction="none")
    return _cell_mean(error, answer.pixels)


@TASK_TERMS.term("focal", 20.0)
def _focal(answer: Segmented) -> Float[Tensor, "g n m"]:
    """Each pixel: focal loss with ``loss.focal_gamma`` and ``loss.focal_alpha``, mean over pixels."""
    return _cell_mean(soft_focal(answer.logits, answer.target, answer.gamma, answer.alpha), answer.pixels)


@TASK_TERMS.term("dice", 1.0)
def _dice(answer: Segmented) -> Float[Tensor, "g n m"]:
    """Mask: Dice with squared denominators."""
    return soft_dice(answer.probability.flatten(-2), answer.target.flatten(-2))


@TASK_TERMS.term("iou", 1.0)
def _iou(answer: Segmented) -> Float[Tensor, "g n m"]:
    """Predicted IoU of every mask, against its true IoU: squared error."""
    return (answer.iou - _true_iou(answer.logits, answer.target)).square()


def _true_iou(logits: Float[Tensor, "g n m h w"], target: Float[Tensor, "g n m h w"]) -> Float[Tensor, "g n m"]:
    """Return the IoU of ``logits > 0`` and ``target > 0.5``.

    It is 0 if both are empty: an object that is too small for the grid counts as missed.
    """
    predicted, wanted = (logits > 0).flatten(-2), (target > 0.5).flatten(-2)
    return (predicted & wanted).sum(-1) / (predicted | wanted).sum(-1).clamp(min=1)


def _same_but_grid(ours: Tensor, theirs: Tensor) -> None:
    """Raise ``ValueError`` if shapes differ in more than the grid, because broadcasting would hide a wrong layout."""
    if ours.shape[:-2] != theirs.shape[:-2]:
        raise ValueError(f"the student's {tuple(ours.shape)} and the teacher's {tuple(theirs.shape)} do not match")


def _prepared(
    ours: Float[Tensor, "b c h w"], theirs: Float[Tensor, "b c th tw"], inside: Bool[Tensor, "b h w"] | None = None
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Return both in float32 at the student's resolution, the teacher's detached, with zeros outside."""
    _same_but_grid(ours, theirs)
    ours, theirs, size = ours.float(), theirs.detach().float(), ours.shape[-2:]
    if theirs.shape[-2:] != size:
        theirs = F.interpolate(theirs, size, mode="bilinear", align_corners=False)
    if inside is None:
        return ours, theirs
    if inside.shape != (ours.shape[0], *size):
        raise ValueError(f"inside {tuple(inside.shape)} is not the grid of {tuple(ours.shape)}")
    return torch.where(inside[:, None], ours, 0.0), torch.where(inside[:, None], theirs, 0.0)


def _cell_mean(values: Float[Tensor, "*n h w"], inside: Bool[Tensor, "*#n h w"] | None = None) -> Float[Tensor, "*n"]:
    """Average over the cells, or over those inside."""
    if inside is None:
        return values.mean((-2, -1))
    return torch.where(inside, values, 0.0).sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)
