"""Masks side by side: the same prompts answered by every model, drawn over the image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from ..inference.prompting import PromptKind, Targets
from ..ops.masks import mask_iou
from .result import Panel, Picture

COLOURS = (
    (230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230),
    (210, 245, 60), (250, 190, 212), (0, 128, 128), (170, 110, 40), (255, 225, 25),
)  # fmt: skip
GROUND_TRUTH = "ground truth"
SIDE = 384  # longer side of a panel in pixels
MOST = 8  # objects drawn on one picture; more hide each other


def picture(
    key: str,
    canvas: UInt8[Tensor, "3 s s"],
    size: tuple[int, int],
    kind: PromptKind,
    targets: Targets,
    found: Mapping[str, Bool[Tensor, "1 n s s"]],
    against: str | None,
) -> Picture:
    """One image with its prompts, its ground truth, and every model's masks.

    size: of the canvas' unpadded part. targets: of this image alone. found: masks by model. against: the model whose
    masks the others are compared with; None compares with ``targets``, which are then drawn as ground truth.
    """
    height, width = size
    scale = SIDE / max(height, width)
    shown = Image.fromarray(canvas[:, :height, :width].permute(1, 2, 0).cpu().numpy())
    shown = shown.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    drawn = {GROUND_TRUTH: targets.masks} if against is None else {}
    reference = GROUND_TRUTH if against is None else against
    drawn |= found
    panels = [Panel("image", _with_prompts(np.asarray(shown), kind, targets, scale))]
    for name, masks in drawn.items():
        iou = None if name == reference else float(mask_iou(masks, drawn[reference]).mean())
        panels.append(Panel(name, overlay(np.asarray(shown), masks[0, :, :height, :width]), iou))
    return Picture(key, kind, reference, tuple(panels))


def overlay(image: UInt8[np.ndarray, "h w 3"], masks: Bool[Tensor, "n a b"]) -> UInt8[np.ndarray, "h w 3"]:
    """Masks of any resolution over ``image``: a tint and an outline in each object's own colour."""
    height, width = image.shape[:2]
    result = image.astype(np.float32) * 0.85
    for number in masks.flatten(1).sum(1).argsort(descending=True).tolist():  # a large mask hides no small one
        # smooth edges: bilinear before the threshold, as the models' own masks are made
        one = masks[number][None, None].float().cpu()
        mask = F.interpolate(one, (height, width), mode="bilinear", align_corners=False)[0, 0] > 0.5
        colour = np.array(COLOURS[number % len(COLOURS)], np.float32)
        inside = mask.numpy()
        result[inside] = 0.45 * result[inside] + 0.55 * colour
        result[_outline(mask)] = 0.25 * 255 + 0.75 * colour
    return result.clip(0, 255).astype(np.uint8)


def _outline(mask: Bool[Tensor, "h w"]) -> np.ndarray:
    """The two pixels inside a mask's edge; the image's border is no edge."""
    outside = (~mask)[None, None].float()
    return (mask & (F.max_pool2d(outside, 5, stride=1, padding=2)[0, 0] > 0)).numpy()


def _with_prompts(image: np.ndarray, kind: PromptKind, targets: Targets, scale: float) -> UInt8[np.ndarray, "h w 3"]:
    """Boxes, or the first click of each object; the corrective clicks differ from model to model."""
    drawn = Image.fromarray(image.copy())
    pen = ImageDraw.Draw(drawn)
    boxes, points = targets.box.boxes, targets.point.points
    assert boxes is not None and points is not None
    for number, (box, point) in enumerate(zip(boxes[0].tolist(), points[0, :, 0].tolist(), strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        if kind == "box":
            left, top, right, bottom = (v * scale for v in box)
            pen.rectangle((left, top, right, bottom), outline=(255, 255, 255), width=4)
            pen.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=colour, width=2)
        else:
            x, y = ((v + 0.5) * scale for v in point)
            pen.ellipse((x - 7, y - 7, x + 7, y + 7), fill=(255, 255, 255))
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
    return np.asarray(drawn)
