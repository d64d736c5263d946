"""Heads: modules that turn a backbone's feature maps into the teacher's image embedding.

A head is built by ``HEADS.get(name)(channels, hidden_size)``, where ``channels`` are those of the maps, finest first.
``forward(maps, grid)`` returns a tensor (b, hidden_size, *grid).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.flops import count_flops
from ..registry import HEADS
from .backbones import build_backbone, feature_maps, levels

Grid = tuple[int, int]


@HEADS.register("published")
class PublishedHead(nn.Sequential):
    """EfficientSAM3's head: Conv1x1-BN-GELU-Conv3x3 on the coarsest map, resized to the grid bilinearly.

    The modules have the indices 0, 1 and 3, so its keys are the published ``head.{0,1,3}``.
    """

    def __init__(self, channels: Sequence[int], hidden_size: int) -> None:
        super().__init__(
            nn.Conv2d(channels[-1], hidden_size, 1, bias=False),
            nn.BatchNorm2d(hidden_size),
            nn.GELU(),
            nn.Conv2d(hidden_size, hidden_size, 3, padding=1),
        )

    def forward(self, maps: Sequence[Float[Tensor, "b _ _ _"]], grid: Grid) -> Float[Tensor, "b d gh gw"]:
        """Predict the embedding on ``grid`` (height, width in cells) from the coarsest map."""
        return F.interpolate(super().forward(maps[-1]), grid, mode="bilinear", align_corners=False)


class FusionBlock(nn.Module):
    """Residual block: depthwise 5x5 convolution, BatchNorm, and an inverted bottleneck of twice the width.

    It is ConvNeXt's block with BatchNorm.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Float[Tensor, "b w gh gw"]) -> Float[Tensor, "b w gh gw"]:
        return x + self.project(F.gelu(self.expand(self.norm(self.spatial(x)))))


@HEADS.register("fused")
class FusedHead(nn.Module):
    """Head that projects all maps of stride 4 to 32 to one width, sums them on the target grid, and mixes the sum.

    At 1008 px the maps are 252, 126, 63 and 32 cells wide and the grid 72. The three finer maps supply detail that the
    coarsest map lacks. The width is a quarter of 1024 channels, and half of ``hidden_size`` below 512, so the head
    stays smaller than ``published`` at every size. The last convolution has no normalisation or activation, because the
    target is an unbounded regression value.
    """

    def __init__(self, channels: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        width, self.strides = self.sizes(len(channels), hidden_size)
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, stride, stride, bias=False), nn.BatchNorm2d(width))
            for c, stride in zip(channels, self.strides, strict=True)
        )
        self.blocks = nn.Sequential(FusionBlock(width), FusionBlock(width))
        self.output = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.GELU(),
            nn.Conv2d(2 * width, hidden_size, 1),
        )

    @staticmethod
    def sizes(maps: int, hidden_size: int) -> tuple[int, list[int]]:
        """Return the width, and the stride of the projection of each map, finest first."""
        return min(256, max(hidden_size // 2, 1)), [1] * maps

    def forward(self, maps: Sequence[Float[Tensor, "b _ _ _"]], grid: Grid) -> Float[Tensor, "b d gh gw"]:
        """Predict the embedding on ``grid`` (height, width in cells) from all maps, finest first."""
        fused = None
        for lateral, x, stride in zip(self.laterals, maps, self.strides, strict=True):
            size = (grid[0] * stride, grid[1] * stride)
            finer = stride > 1 or x.shape[-2] > size[0]
            level = lateral(to_grid(x, size)) if finer else to_grid(lateral(x), size)  # project at the smaller size
            fused = level if fused is None else fused + level
        return self.output(self.blocks(fused))


@HEADS.register("strided")
class StridedHead(FusedHead):
    """``FusedHead`` whose projections of the finer maps are convolutions over all positions of a cell.

    A ViT's cell describes its whole patch, and SAM 3's neck reads maps of four times the grid's resolution from it.
    ``fused`` averages a cell's positions in the finer maps first, so it loses where in the cell something is. Here the
    maps of stride 4 and 8 have 4 x 4 and 2 x 2 positions per cell, and each position has weights of its own. The width
    is ``hidden_size``, at most 256.
    """

    @staticmethod
    def sizes(maps: int, hidden_size: int) -> tuple[int, list[int]]:
        return min(256, hidden_size), [2 ** max(0, maps - 2 - number) for number in range(maps)]


def to_grid(x: Float[Tensor, "b c h w"], grid: Grid) -> Float[Tensor, "b c gh gw"]:
    """Resize maps to ``grid`` with aligned pixel centres.

    A map of more than twice the grid's resolution is averaged, so that no pixel is skipped. Only bilinear interpolation
    and average pooling are used. Every exporter supports them, unlike antialiased and adaptive resizing.
    """
    factor = max(1, min(x.shape[-2] // grid[0], x.shape[-1] // grid[1]))
    size = (grid[0] * factor, grid[1] * factor)
    if x.shape[-2:] != size:
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    return F.avg_pool2d(x, factor) if factor > 1 else x


@dataclass(frozen=True)
class HeadCost:
    """Cost of a head on a backbone, for one image.

    Attributes:
        head: Name of the head.
        params: Number of parameters.
        gflops: Work in 1e9 operations. A multiply-add counts as two.
        milliseconds: Median duration of a forward pass.
    """

    head: str
    params: int
    gflops: float
    milliseconds: float


@torch.inference_mode()
def compare_heads(
    backbone: str, hidden_size: int = 1024, image_size: int = 1008, repeats: int = 5, device: str = "cpu"
) -> list[HeadCost]:
    """Measure parameters, work and latency of every registered head on a backbone, for one image, in eval mode.

    Only the head is timed. Its inputs are random maps with the backbone's shapes. The rounds alternate between the
    heads, so that other load on the machine affects all heads equally.

    Args:
        backbone: A student's name or a timm name.
        hidden_size: Channels of the teacher's embedding.
        image_size: Side of the square input in pixels.
        repeats: Number of timed rounds. One more round before them is not counted.
        device: Device to run on.
    """
    net = build_backbone(backbone, image_size).eval()
    wanted, grid = levels(net), (image_size // 14, image_size // 14)
    shapes = [
        m.shape for m in feature_maps(net.to("meta"), wanted, torch.empty(1, 3, image_size, image_size, device="meta"))
    ]
    maps = [torch.randn(shape, device=device) for shape in shapes]
    heads = {name: HEADS.get(name)([w.channels for w in wanted], hidden_size).to(device).eval() for name in HEADS}
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(repeats + 1):
        for name, head in heads.items():
            stamps = [_now(device)]
            head(maps, grid)
            stamps.append(_now(device))
            seconds[name].extend(b - a for a, b in pairwise(stamps))
    costs = []
    for name, head in heads.items():
        with count_flops() as counter:
            head(maps, grid)
        params = sum(p.numel() for p in head.parameters())
        costs.append(HeadCost(name, params, counter.get_total_flops() / 1e9, 1e3 * median(seconds[name][1:])))
    return costs


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
