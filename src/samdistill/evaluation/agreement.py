"""Objects that a teacher segments on images without annotations, as a reference for other models."""

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
    """Rules by which objects are selected from a teacher's masks.

    The teacher gets one click per cell of a grid. Masks of plausible size and high predicted IoU are kept, and
    duplicates are removed.

    Attributes:
        grid: Clicks along each side of the image; grid * grid in all.
        min_area: Smallest area of an object, as a fraction of the image.
        max_area: Largest area of an object, as a fraction of the image.
        quantile: Masks below this quantile of the image's predicted IoU are removed. The threshold is not absolute,
            because the predicted IoU of small teachers is poorly calibrated.
        overlap: Of two masks with a higher IoU, the one with the lower predicted IoU is removed.
        limit: Largest number of objects per image.
    """

    grid: int = 8
    min_area: float = 0.002
    max_area: float = 0.6
    quantile: float = 0.5
    overlap: float = 0.7
    limit: int = 16

    @torch.no_grad()
    def find(self, teacher: Promptable, embeddings: Embeddings, batch: ImageBatch) -> list[Bool[Tensor, "n h w"]]:
        """Segment objects on a batch of images.

        Args:
            teacher: The model.
            embeddings: Its features of the b images.
            batch: The images.

        Returns:
            For each image n masks on the canvas, of shape (n, h, w), sorted by predicted IoU, highest first. n may be
            0.
        """
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
                found.append(shown.new_zeros(0, *canvas))  # interpolate does not accept an empty batch
                continue
            masks = to_canvas(logits[image, chosen][None], canvas)[0] & shown[image]
            found.append(masks[masks.flatten(1).any(1)])
        return found

    def _choose(
        self, masks: Bool[Tensor, "n h w"], scores: Float[Tensor, " n"], inside: Bool[Tensor, "h w"]
    ) -> Int[Tensor, " k"]:
        """Select the masks of one image and return their indices, highest predicted IoU first."""
        masks = masks & inside
        area = masks.flatten(1).sum(1) / inside.sum().clamp(min=1)
        sane = ((area >= self.min_area) & (area <= self.max_area)).nonzero()[:, 0]
        if len(sane) == 0:
            return sane
        sure = sane[scores[sane] >= scores[sane].quantile(self.quantile)]
        ranked = sure[scores[sure].argsort(descending=True, stable=True)]
        return ranked[suppress(masks[ranked], self.overlap)][: self.limit]


def _click(model: Promptable, embeddings: Embeddings, points: Float[Tensor, "b n 2"]) -> tuple[Tensor, Tensor]:
    """Predict low-res logits (b, n, h, w) and IoU (b, n) for n objects with one positive click each."""
    valid = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
    labels = torch.ones((*points.shape[:2], 1), dtype=torch.int64, device=points.device)
    return predict(model, embeddings, Prompts(valid, points=points[:, :, None], labels=labels)).best()


def grid_points(sizes: Int[Tensor, "b 2"], grid: int) -> Float[Tensor, "b n 2"]:
    """Compute click positions on a regular grid.

    Args:
        sizes: Height and width of the images without padding, in pixels, of shape (b, 2).
        grid: Number of cells along each side.

    Returns:
        x, y of the centres of the grid * grid equal cells, in pixels, of shape (b, n, 2).
    """
    steps = (torch.arange(grid, device=sizes.device) + 0.5) / grid
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    unit = torch.stack([x.flatten(), y.flatten()], -1)
    return unit[None] * sizes.flip(-1)[:, None]


def suppress(masks: Bool[Tensor, "n h w"], overlap: float) -> Int[Tensor, " k"]:
    """Apply greedy non-maximum suppression by mask IoU.

    Args:
        masks: n masks, best first.
        overlap: A mask with a higher IoU with a kept mask is removed.

    Returns:
        Ascending indices of the kept masks, of shape (k,).
    """
    flat = masks.flatten(1).float()
    area, common = flat.sum(1), flat @ flat.T
    iou = common / (area[:, None] + area[None] - common).clamp(min=1)
    kept: list[int] = []
    for index, row in enumerate(iou.cpu()):
        if all(row[earlier] <= overlap for earlier in kept):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64, device=masks.device)
