"""What the sandbox's teacher is trained on: prompts drawn from rendered scenes, and a warm-up of its decoder."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F
from transformers import Sam3TrackerModel

from ..inference.prompting import refined_prompts
from ..losses.mask import iou_mse, mask_bce, mask_dice
from ..ops.masks import masks_to_boxes, random_points
from ..ops.promptable import Embeddings, embed, predict, to_canvas
from ..types import ImageBatch, Prompts, Term, Terms
from .scenes import Scenes
from .teacher import HIDDEN, IMAGE_SIZE


def _pick(scenes: Scenes, count: int, generator: torch.Generator) -> tuple[Tensor, Bool[Tensor, "b n"]]:
    """``count`` annotated slots of each scene, with replacement: masks (b, n, h, w) and whether the scene has any."""
    weights = scenes.valid.float()
    some = weights.sum(1) > 0
    weights[~some] = 1
    slots = torch.multinomial(weights, count, replacement=True, generator=generator)
    masks = scenes.masks.gather(1, slots[..., None, None].expand(-1, -1, *scenes.masks.shape[-2:]))
    return masks, some[:, None].expand(-1, count)


def _terms(logits: Tensor, iou: Tensor, target: Tensor, valid: Tensor, prefix: str) -> dict[str, Term]:
    up = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False).flatten(0, 1)
    wanted, ok = target.flatten(0, 1).float(), valid.flatten()
    return {
        f"{prefix}/bce": Term(mask_bce(up, wanted, ok), 5.0),
        f"{prefix}/dice": Term(mask_dice(up, wanted, ok), 2.0),
        f"{prefix}/iou": Term(iou_mse(iou.flatten(), up, wanted, ok), 1.0),
    }


def _box_prompts(masks: Tensor, valid: Tensor, generator: torch.Generator, jitter: float) -> Prompts:
    boxes = masks_to_boxes(masks)
    size = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    noise = torch.randn(boxes.shape, generator=generator, device=boxes.device).clamp(-2, 2) * jitter
    return Prompts(valid, boxes=(boxes + noise * size).clamp(0, IMAGE_SIZE))


def _point_prompts(masks: Tensor, valid: Tensor, generator: torch.Generator) -> Prompts:
    points, _ = random_points(masks.flatten(0, 1), generator)
    points = points.view(*masks.shape[:2], 1, 2).float()
    return Prompts(valid, points=points, labels=torch.ones(points.shape[:3], dtype=torch.int64, device=points.device))


def teacher_terms(
    model: Sam3TrackerModel, scenes: Scenes, generator: torch.Generator, prompts_per_image: int = 3
) -> Terms:
    """Mask, Dice and IoU terms of a box and a point for each picked object, and of one corrective click per image."""
    embeddings = embed(model, ImageBatch.full(scenes.images))
    n = prompts_per_image
    masks, valid = _pick(scenes, 2 * n, generator)
    boxed, pointed = masks[:, :n], masks[:, n:]
    box = predict(model, embeddings, _box_prompts(boxed, valid[:, :n], generator, 0.05))
    terms = _terms(box.low_res_masks[:, :, 0], box.iou_scores[..., 0], boxed, valid[:, :n], "box")
    clicks = _point_prompts(pointed, valid[:, n:], generator)
    point = predict(model, embeddings, clicks)
    terms |= _terms(point.low_res_masks[:, :, 0], point.iou_scores[..., 0], pointed, valid[:, n:], "point")
    first = Prompts(valid[:, :1], clicks.points[:, :1], clicks.labels[:, :1])
    logits = point.low_res_masks[:, :1, 0]
    again = refined_prompts(first, logits, to_canvas(logits, pointed.shape[-2:]), pointed[:, :1])
    refined = predict(model, embeddings, again)
    terms |= _terms(refined.low_res_masks[:, :, 0], refined.iou_scores[..., 0], pointed[:, :1], valid[:, :1], "refine")
    return Terms(terms)


def prompt_terms(model: Sam3TrackerModel, generator: torch.Generator, batch_size: int, prompts_per_image: int) -> Terms:
    """The decoder's warm-up: without any image, a box means the ellipse inside it and a point a disc around it.

    Trained on scenes from the start, a fresh decoder settles on "everything that stands out" and ignores its prompts
    for thousands of steps (box and point mIoU equal to three digits); 150 of these cheap steps end that.
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
        terms |= _terms(out.low_res_masks[:, :, 0], out.iou_scores[..., 0], target, valid, name)
    return Terms(terms)
