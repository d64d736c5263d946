"""Quantisation-aware training (``train.qat``): layers of the student compute with the roundings of an int8 export."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
"""Layers that an int8 export quantises. It also quantises products of two activations, which are left out here."""
WEIGHT_STEPS = 64
"""Steps of a weight from 0 to the largest value of its output channel: 7 bits, onnxruntime's ``reduce_range``."""
INPUT_STEPS = 255
"""Steps of an input from its smallest to its largest value: 8 bits."""
MOMENTUM = 0.01
"""Weight of one optimiser step in the moving range of an input."""
FIXED = 0.1
"""Share of the quantised steps, at the end, in which ranges do not change."""


def rounded_weight(weight: Float[Tensor, "o ..."]) -> Float[Tensor, "o ..."]:
    """Round a weight to the values that it has in int8: per output channel, symmetric. The gradient passes unchanged.

    Example:
        >>> rounded_weight(torch.tensor([[1.0, 0.013, -0.5]])) * 64
        tensor([[ 64.,   1., -32.]])
    """
    largest = weight.detach().abs().flatten(1).amax(1)
    scale = torch.where(largest > 0, largest / WEIGHT_STEPS, 1.0)
    zeros = torch.zeros(len(scale), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -WEIGHT_STEPS, WEIGHT_STEPS)


def rounded_input(x: Tensor, extent: Float[Tensor, " 2"]) -> Tensor:
    """Round an input to the values that it has in uint8. The gradient of a value outside the range is 0.

    Args:
        x: The input, of any shape.
        extent: How far the range reaches below and above 0; both are at least 0.
    """
    scale = extent.sum() / INPUT_STEPS
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (extent[0] / scale).round().to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, 0, INPUT_STEPS).to(x.dtype)


class _Quantised:
    """Mixin before a layer class: rounded input and weight. Names and values of parameters do not change."""

    quantisation: Quantisation
    place: int

    @property
    def weight(self) -> Tensor:
        own: Any = self
        weight = own._parameters["weight"]
        return rounded_weight(weight) if self.quantisation.on else weight

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        return super().forward(self.quantisation.input(self.place, x, own.training))  # type: ignore[misc]


class Quantisation:
    """Ranges of the inputs of all layers of a student, and the steps in which they are rounded.

    A range is a moving average of the smallest and the largest value of a global batch, so it does not depend on ranks
    and micro-batches. A layer whose input has no range yet rounds its weight alone. Ranges move in train mode only.

    Args:
        student: The student. Its layers are changed in place.
        exported: The part of it that is exported (``Task.export``). Other layers are left alone.
        start: The first step (from 0) with roundings. None leaves the student alone.
        total: Steps of the run.
    """

    def __init__(self, student: nn.Module, exported: nn.Module, start: int | None, total: int) -> None:
        own = {id(parameter) for parameter in exported.parameters()} if start is not None else set()
        layers = [one for one in student.modules() if isinstance(one, LAYERS) and id(one.weight) in own]
        self.start = total if start is None else start
        self.fixed = total - math.floor(FIXED * (total - self.start))
        device = layers[0].weight.device if layers else torch.device("cpu")
        self.extents = torch.full((len(layers), 2), math.nan, device=device)
        self._seen = torch.full_like(self.extents, -math.inf)
        self._known, self.on, self._moves = [False] * len(layers), False, False
        for place, layer in enumerate(layers):
            kind = type(layer)
            layer.__class__ = type(f"Quantised{kind.__name__}", (_Quantised, kind), {})
            layer.quantisation, layer.place = self, place  # type: ignore[assignment]

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.extents)

    def begin(self, step: int) -> None:
        """Set what step ``step`` (from 0) does. Evaluation after it does the same."""
        self.on, self._moves = step >= self.start, self.start <= step < self.fixed

    def input(self, place: int, x: Tensor, training: bool) -> Tensor:
        """Return the rounded input of a layer, and note its range in train mode."""
        if self.on and self._moves and training and x.numel():
            low, high = x.detach().aminmax()
            self._seen[place] = torch.maximum(self._seen[place], torch.stack([-low, high]).float())
        return rounded_input(x, self.extents[place]) if self.on and self._known[place] else x

    @torch.no_grad()
    def update(self) -> None:
        """Move the ranges by what the step has seen on all ranks. Every rank calls it after the step."""
        if not (self.on and self._moves and len(self)):
            return
        if dist.is_initialized():
            dist.all_reduce(self._seen, dist.ReduceOp.MAX)
        met, seen = self._seen.isfinite().all(1, keepdim=True), self._seen.clamp(min=0)  # a range contains 0
        moved = torch.where(self.extents.isnan(), seen, self.extents.lerp(seen, MOMENTUM))
        self.load(torch.where(met, moved, self.extents))
        self._seen.fill_(-math.inf)

    def load(self, extents: Tensor) -> None:
        """Set all ranges, those of a checkpoint for example."""
        self.extents.copy_(extents)
        if not all(self._known):
            self._known = (~self.extents.isnan()).all(1).tolist()

    @torch.no_grad()
    def measure(self, forward: Callable[[], object]) -> None:
        """Take the ranges from one forward pass, and round from then on."""
        self.begin(self.start)
        forward()
        self.update()

    def state(self) -> Tensor | None:
        """Return what a checkpoint has to hold: the ranges. None without layers."""
        return self.extents if len(self) else None
