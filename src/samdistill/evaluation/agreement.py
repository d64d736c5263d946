"""Objects without labels: what the teacher itself segments on an image, so that agreement can be measured anywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..inference.prompting import prompts_at_once
from ..ops.promptable import Embeddings, Promptable, predict, to_canvas
from ..types import ImageBatch, Prompts


@dataclass(frozen=True)
class PseudoObjects:
    """How the teacher's own objects are found: a grid of clicks, the surest half, without repeats.

    grid: clicks along each side of the image. min_area, max_area: share of the image. quantile: of the predicted IoU,
    per image and not absolute, because small teachers are badly calibrated. overlap: mask IoU above which the
    surer of two wins. limit: objects per image.
    """

    grid: int = 8
    min_area: float = 0.002
    max_area: float = 0.6
    quantile: float = 0.5
    overlap: float = 0.7
    limit: int = 16

    @torch.no_grad()
    def find(self, teacher: Promptable, embeddings: Embeddings, batch: ImageBatch) -> list[Bool[Tensor, "n h w"]]:
        """Canvas masks for each image, surest first; an image on which nothing qualifies gets none."""
        points = grid_points(batch.sizes, self.grid)
        canvas = (batch.images.shape[-2], batch.images.shape[-1])
        asked = [_click(teacher, embeddings, some) for some in points.split(prompts_at_once(len(batch), canvas), 1)]
        logits, scores = (torch.cat(parts, 1) for parts in zip(*asked, strict=True))
        inside = batch.valid((logits.shape[-2], logits.shape[-1]))
        shown = batch.valid(canvas)
        found = []
        for image in range(len(batch)):
            chosen = self._choose(logits[image] > 0, scores[image], inside[image])
            if len(chosen) == 0:
                found.append(shown.new_zeros(0, *canvas))  # nothing to resize, which interpolate refuses
                continue
            masks = to_canvas(logits[image, chosen][None], canvas)[0] & shown[image]
            found.append(masks[masks.flatten(1).any(1)])
        return found

    def _choose(
        self, masks: Bool[Tensor, "n h w"], scores: Float[Tensor, " n"], inside: Bool[Tensor, "h w"]
    ) -> Int[Tensor, " k"]:
        masks = masks & inside
        area = masks.flatten(1).sum(1) / inside.sum().clamp(min=1)
        sane = ((area >= self.min_area) & (area <= self.max_area)).nonzero()[:, 0]
        if len(sane) == 0:
            return sane
        sure = sane[scores[sane] >= scores[sane].quantile(self.quantile)]
        ranked = sure[scores[sure].argsort(descending=True, stable=True)]
        return ranked[suppress(masks[ranked], self.overlap)][: self.limit]


def _click(model: Promptable, embeddings: Embeddings, points: Float[Tensor, "b n 2"]) -> tuple[Tensor, Tensor]:
    """Low-resolution logits (b, n, h, w) and predicted IoU (b, n) for one click per object."""
    valid = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
    labels = torch.ones((*points.shape[:2], 1), dtype=torch.int64, device=points.device)
    return predict(model, embeddings, Prompts(valid, points=points[:, :, None], labels=labels)).best()


def grid_points(sizes: Int[Tensor, "b 2"], grid: int) -> Float[Tensor, "b n 2"]:
    """x, y at the centres of ``grid`` x ``grid`` equal cells of each image's unpadded part."""
    steps = (torch.arange(grid, device=sizes.device) + 0.5) / grid
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    unit = torch.stack([x.flatten(), y.flatten()], -1)
    return unit[None] * sizes.flip(-1)[:, None]


def suppress(masks: Bool[Tensor, "n h w"], overlap: float) -> Int[Tensor, " k"]:
    """Greedy non-maximum suppression by mask IoU: indices kept, in order; masks come best first."""
    flat = masks.flatten(1).float()
    area, common = flat.sum(1), flat @ flat.T
    iou = common / (area[:, None] + area[None] - common).clamp(min=1)
    kept: list[int] = []
    for index, row in enumerate(iou.cpu()):
        if all(row[earlier] <= overlap for earlier in kept):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64, device=masks.device)
