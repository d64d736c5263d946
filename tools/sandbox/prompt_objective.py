"""Training loss of promptable teachers on rendered scenes, and a warm-up of the tracker's decoder."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F
from transformers import Sam3TrackerModel

from mask_objective import iou_mse, mask_bce, mask_dice
from samdistill.inference.prompting import refined_prompts
from samdistill.losses.mask import soft_mask_loss
from samdistill.ops.masks import masks_to_boxes, random_points
from samdistill.ops.promptable import Embeddings, MaskPrediction, Promptable, embed, predict, to_canvas
from samdistill.sandbox.scenes import Scenes
from samdistill.types import ImageBatch, Prompts, Term, Terms
from tracker_model import HIDDEN, IMAGE_SIZE

BOXES_WITH_POINT = 0.25
"""Fraction of the steps in which boxes have an additional point inside, for models trained on mixed prompts."""
MOST_POINTS = 3


def _pick(scenes: Scenes, count: int, generator: torch.Generator) -> tuple[Tensor, Bool[Tensor, "b n"]]:
    """Draw ``count`` annotated objects of each scene with replacement.

    Returns:
        Masks (b, n, h, w), and whether the scene has any annotated object.
    """
    weights = scenes.valid.float()
    some = weights.sum(1) > 0
    weights[~some] = 1
    slots = torch.multinomial(weights, count, replacement=True, generator=generator)
    masks = scenes.masks.gather(1, slots[..., None, None].expand(-1, -1, *scenes.masks.shape[-2:]))
    return masks, some[:, None].expand(-1, count)


def _terms(found: MaskPrediction, target: Bool[Tensor, "b n h w"], valid: Tensor, prefix: str) -> dict[str, Term]:
    """Return mask and IoU terms. If a prompt has several masks, mask terms train the best one, so that the others can
    represent other objects. The IoU term trains all (Kirillov et al., SAM, 2023, section 3 and appendix A)."""
    count = found.iou_scores.shape[-1]
    masks = found.low_res_masks.flatten(0, 1)
    up = F.interpolate(masks, target.shape[-2:], mode="bilinear", align_corners=False)
    wanted, ok = target.flatten(0, 1).float(), valid.flatten()
    each = wanted[:, None].expand_as(up).flatten(0, 1)
    best = soft_mask_loss(up.detach().flatten(0, 1), each).view(-1, count).argmin(1)
    chosen = up[torch.arange(len(up), device=up.device), best]
    all_iou = iou_mse(found.iou_scores.flatten(), up.flatten(0, 1), each, ok.repeat_interleave(count))
    return {
        f"{prefix}/bce": Term(mask_bce(chosen, wanted, ok), 5.0),
        f"{prefix}/dice": Term(mask_dice(chosen, wanted, ok), 2.0),
        f"{prefix}/iou": Term(all_iou, 1.0),
    }


def _box_prompts(masks: Tensor, valid: Tensor, generator: torch.Generator, jitter: float) -> Prompts:
    boxes = masks_to_boxes(masks)
    size = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    noise = torch.randn(boxes.shape, generator=generator, device=boxes.device).clamp(-2, 2) * jitter
    return Prompts(valid, boxes=(boxes + noise * size).clamp(0, masks.shape[-1]))


def _point_prompts(masks: Tensor, valid: Tensor, generator: torch.Generator, count: int = 1) -> Prompts:
    """Draw ``count`` random points inside each mask."""
    flat = masks.flatten(0, 1)
    draws = torch.rand(count, len(flat), generator=generator, device=flat.device)
    points = torch.stack([random_points(flat, each)[0] for each in draws], 1).view(*masks.shape[:2], count, 2).float()
    return Prompts(valid, points=points, labels=torch.ones(points.shape[:3], dtype=torch.int64, device=points.device))


def _mixed_prompts(masks: Tensor, valid: Tensor, generator: torch.Generator) -> Prompts:
    """Draw one to ``MOST_POINTS`` points inside each mask and, in half of the steps, one outside."""
    more, outside = (torch.randint(n, (), generator=generator, device=masks.device).item() for n in (MOST_POINTS, 2))
    inside = _point_prompts(masks, valid, generator, 1 + int(more))
    if not outside:
        return inside
    other = _point_prompts(~masks, valid, generator)
    return Prompts(valid, torch.cat([inside.points, other.points], 2), torch.cat([inside.labels, 0 * other.labels], 2))


def teacher_terms(
    model: Promptable, scenes: Scenes, generator: torch.Generator, prompts_per_image: int = 3, multimask: bool = False
) -> Terms:
    """Mask, Dice and IoU terms of a box and a point for each picked object, and of one corrective click per image.

    With ``multimask``, a point is answered with three masks, and the best one is trained. Boxes sometimes have an
    additional point, and the terms ``points`` are for one mask from one to four points.
    """
    embeddings = embed(model, ImageBatch.full(scenes.images))
    n = prompts_per_image
    masks, valid = _pick(scenes, 3 * n if multimask else 2 * n, generator)
    boxed, pointed, valid = masks[:, :n], masks[:, n : 2 * n], valid[:, :n]  # a scene is valid as a whole
    boxes = _box_prompts(boxed, valid, generator, 0.05)
    if multimask and torch.rand((), generator=generator, device=valid.device).item() < BOXES_WITH_POINT:
        within = _point_prompts(boxed, valid, generator)
        boxes = Prompts(valid, within.points, within.labels, boxes.boxes)
    terms = _terms(predict(model, embeddings, boxes), boxed, valid, "box")
    clicks = _point_prompts(pointed, valid, generator)
    point = predict(model, embeddings, clicks, multimask)
    terms |= _terms(point, pointed, valid, "point")
    first = Prompts(valid[:, :1], clicks.points[:, :1], clicks.labels[:, :1])
    logits = point.best()[0][:, :1]
    again = refined_prompts(first, logits, to_canvas(logits, pointed.shape[-2:]), pointed[:, :1])
    terms |= _terms(predict(model, embeddings, again), pointed[:, :1], valid[:, :1], "refine")
    if multimask:
        several = _mixed_prompts(masks[:, 2 * n :], valid, generator)
        terms |= _terms(predict(model, embeddings, several), masks[:, 2 * n :], valid, "points")
    return Terms(terms)


def prompt_terms(model: Sam3TrackerModel, generator: torch.Generator, batch_size: int, prompts_per_image: int) -> Terms:
    """Return the terms of the decoder's warm-up on an empty embedding.

    The target of a box is the ellipse inside it, and that of a point a disc around it. Without the warm-up, a new
    decoder segments all salient objects and ignores its prompts for thousands of steps (box and point mIoU are equal to
    three digits). 150 of these fast steps are sufficient.
    """
    shape = (batch_size, prompts_per_image)
    levels = tuple(
        torch.zeros(batch_size, c, *s)
        for c, s in zip((HIDDEN // 8, HIDDEN // 4, HIDDEN), model.backbone_feature_sizes, strict=True)
    )
    levels = (*levels[:2], levels[2] + model.no_memory_embedding.view(1, -1, 1, 1))
    centre = torch.rand(*shape, 2, generator=generator) * IMAGE_SIZE
    half = (0.1 + 0.18 * torch.rand(*shape, 2, generator=generator)) * IMAGE_SIZE
    grid = model.backbone_feature_sizes[0][0]
    axis = (torch.arange(grid) + 0.5) * (IMAGE_SIZE / grid)
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def ellipse(radius: Tensor) -> Tensor:
        dx = (x - centre[..., 0, None, None]) / radius[..., 0, None, None]
        dy = (y - centre[..., 1, None, None]) / radius[..., 1, None, None]
        return dx**2 + dy**2 < 1

    valid = torch.ones(shape, dtype=torch.bool)
    boxes = torch.cat([centre - half, centre + half], -1).clamp(0, IMAGE_SIZE)
    labels = torch.ones(*shape, 1, dtype=torch.int64)
    cases = {
        "box": (Prompts(valid, boxes=boxes), ellipse(half)),
        "point": (Prompts(valid, points=centre[:, :, None], labels=labels), ellipse(torch.full_like(half, 20.0))),
    }
    terms: dict[str, Term] = {}
    for name, (prompts, target) in cases.items():
        out = predict(model, Embeddings(levels, trunk=levels[-1]), prompts)
        terms |= _terms(out, target, valid, name)
    return Terms(terms)
