"""The terms of prompt distillation: four between a student's signals and a teacher's, four against masks of the data.

The four distillation terms and their defaults are those of the published point, box and mixed fine-tuning of MobileSAM,
each a mean over channels, cells or pixels, so that no term grows with the image. Values are given per image or per
object; whoever calls takes the mean over those that count. Everything is computed in float32. Gradients reach whatever
the student's tensors hang on; a teacher's are constants. What the teacher has at another resolution is resized to the
student's, bilinearly. ``ValueError`` where shapes do not match otherwise.

inside, where it is asked for: the cells or pixels that lie on the image. Padding changes no value and gets no gradient,
and an image without such a cell gives 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from .feature import directions
from .mask import soft_dice, soft_focal

FOCAL_TO_DICE = 20.0
"""What decides which of three masks is the best: SAM's own loss, focal and Dice at 20 to 1 (Kirillov et al., 2023)."""


def encoder_patch(
    f_s: Float[Tensor, "b c h w"], f_t: Float[Tensor, "b c th tw"], w_l2: float, w_cos: float,
    inside: Bool[Tensor, "b h w"] | None = None,
) -> Float[Tensor, " b"]:  # fmt: skip
    """``w_l2 MSE + w_cos (1 - cosine)``: squared error per channel and cell, cosine over the channels of a cell.

    A vector shorter than 1e-6 has no direction: it counts as cosine 0, without a gradient.
    """
    f_s, f_t = _prepared(f_s, f_t, inside)
    error = (f_s - f_t).square().mean(1)
    return _cell_mean(w_l2 * error + w_cos * (1 - (directions(f_s) * directions(f_t)).sum(1)), inside)


def prompt_embed(
    f_s: Float[Tensor, "g k c h w"], f_t: Float[Tensor, "g k c th tw"], w_mse: float, w_cos: float
) -> Float[Tensor, "g k"]:
    """``w_mse MSE(u_s, u_t) + w_cos (1 - u_s u_t)`` of the vectors at unit length over the channels.

    The squared error of unit vectors is 2 (1 - cosine) / c, so the first part is the second one again on a smaller
    scale: with 256 channels and equal weights it adds less than a hundredth. Both are in the published formula.
    """
    _same_but_grid(f_s, f_t)
    g, k = f_s.shape[:2]
    u_s, u_t = (directions(f) for f in _prepared(f_s.flatten(0, 1), f_t.flatten(0, 1)))
    cells = w_mse * (u_s - u_t).square().mean(1) + w_cos * (1 - (u_s * u_t).sum(1))
    return _cell_mean(cells).view(g, k)


def mask_token(
    z_s: Float[Tensor, "g n t c"], z_t: Float[Tensor, "g n t c"], w_kl: float, temperature: float
) -> Float[Tensor, "g n"]:
    """``w_kl KL(softmax(z_t / T) || softmax(z_s / T))`` over the channels of a mask token, mean over the tokens.

    Without the factor T^2 that keeps gradients alike between temperatures (Hinton et al., 2015, section 2): near
    equality they are 1 / T^2 of those at T = 1, four times as large at the default of one half. ``w_kl`` evens it out.
    """
    if z_s.shape != z_t.shape:
        raise ValueError(f"mask tokens {tuple(z_s.shape)} of the student and {tuple(z_t.shape)} of the teacher")
    ours, theirs = (F.log_softmax(z.float() / temperature, -1) for z in (z_s, z_t.detach()))
    return w_kl * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean(-1)


def dense_masks(
    logits_s: Float[Tensor, "g n m h w"], logits_t: Float[Tensor, "g n m th tw"], w_kl: float, w_focal: float,
    gamma: float, inside: Bool[Tensor, "g h w"] | None = None,
) -> Float[Tensor, "g n"]:  # fmt: skip
    """``w_kl KL(p_t || p_s) + w_focal focal(p_s, p_t)`` per pixel, mean over the pixels of a mask, then over the masks.

    p is the sigmoid of a logit. The divergence is that of two coins, with the half of p and that of 1 - p. The focal
    loss is ``soft_focal`` without class balance. Both are 0 where the student says what the teacher says.
    """
    _same_but_grid(logits_s, logits_t)
    shape = logits_s.shape
    ours, theirs = _prepared(logits_s.flatten(1, 2), logits_t.flatten(1, 2), inside)
    probability = theirs.sigmoid()
    divergence = _kl_of_coins(theirs, ours)
    values = w_kl * divergence + w_focal * soft_focal(ours, probability, gamma)
    return _cell_mean(values, None if inside is None else inside[:, None]).view(shape[:3]).mean(-1)


def _kl_of_coins(first: Float[Tensor, "*n"], second: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """KL of two Bernoulli distributions from their logits; exact 0 for equal ones, finite for any finite logits."""
    yes = first.sigmoid() * (F.logsigmoid(first) - F.logsigmoid(second))
    no = (-first).sigmoid() * (F.logsigmoid(-first) - F.logsigmoid(-second))
    return yes + no


def task_terms(
    logits: Float[Tensor, "g n m h w"], iou: Float[Tensor, "g n m"], target: Float[Tensor, "g n h w"], gamma: float,
    alpha: float, inside: Bool[Tensor, "g h w"] | None = None,
) -> dict[str, Float[Tensor, "g n"]]:  # fmt: skip
    """``bce``, ``focal``, ``dice`` and ``iou`` of each object; target: the share of each pixel that it covers, 0..1.

    bce, focal: means over pixels; focal is ``soft_focal`` with gamma and alpha. dice: ``soft_dice``. Of several masks
    of one prompt the one with the least 20 focal + dice gets these three, and the others nothing, so that they stay
    free to mean something else (SAM, "resolving ambiguity"). iou: squared error of every mask's predicted IoU against
    the one it has with the target, both cut at one half. All masks learn it, the losers too: the prediction is there
    to choose among them, and one that was never trained on its failures cannot.
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
    values = {
        "bce": _cell_mean(F.binary_cross_entropy_with_logits(logits, target, reduction="none"), pixels),
        "focal": _cell_mean(soft_focal(logits, target, gamma, alpha), pixels),
        "dice": soft_dice(probability.flatten(-2), target.flatten(-2)),
    }
    best = (FOCAL_TO_DICE * values["focal"] + values["dice"]).detach().argmin(-1, keepdim=True)
    found = {name: value.gather(-1, best).squeeze(-1) for name, value in values.items()}
    found["iou"] = (iou.float() - _true_iou(logits, target)).square().mean(-1)
    return found


def _true_iou(logits: Float[Tensor, "g n m h w"], target: Float[Tensor, "g n m h w"]) -> Float[Tensor, "g n m"]:
    """0 where both are empty: an object too small for the grid is missed, not found. A logit of 0 is outside."""
    said, wanted = (logits > 0).flatten(-2), (target > 0.5).flatten(-2)
    return (said & wanted).sum(-1) / (said | wanted).sum(-1).clamp(min=1)


def _same_but_grid(ours: Tensor, theirs: Tensor) -> None:
    """Broadcasting would hide a wrong layout."""
    if ours.shape[:-2] != theirs.shape[:-2]:
        raise ValueError(f"the student's {tuple(ours.shape)} and the teacher's {tuple(theirs.shape)} do not match")


def _prepared(
    ours: Float[Tensor, "b c h w"], theirs: Float[Tensor, "b c th tw"], inside: Bool[Tensor, "b h w"] | None = None
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Both in float32 at the student's resolution, the teacher's as a constant, zeros outside."""
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
    if inside is None:
        return values.mean((-2, -1))
    return torch.where(inside, values, 0.0).sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)
