"""Work-arounds for faults of torch, onnxscript and transformers that only matter in an export.

Each one is active in a ``with`` block around the export alone, so eager results are never affected. The reproductions
are in docs/export.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.sam import modeling_sam
from transformers.models.sam2 import modeling_sam2
from transformers.models.sam3 import modeling_sam3
from transformers.models.sam3_lite_text import modeling_sam3_lite_text
from transformers.models.sam3_tracker import modeling_sam3_tracker

from .regions import pool_aligned, pool_by_products


@dataclass(frozen=True)
class Fault:
    """A fault of another library.

    Attributes:
        library: The library.
        seen: The last version that is known to have it.
        mended: The first version that does not have it. None while no such version is known: a test of the same name
            reproduces the fault, and fails once it is gone.
    """

    library: str
    seen: str
    mended: tuple[int, int] | None = None

    @property
    def present(self) -> bool:
        """Whether the installed version may have the fault."""
        return self.mended is None or tuple(map(int, version(self.library).split(".")[:2])) < self.mended


FAULTS = {
    "repeat_interleave": Fault("onnxscript", "0.7"),
    "coordinates": Fault("transformers", "5.24"),
    "boxes": Fault("transformers", "5.24"),
    "reshape": Fault("torch", "2.14"),
    "coreml_alias": Fault("coremltools", "9.0"),
    "coreml_bitwise_or": Fault("coremltools", "9.0"),
    "coreml_scatter": Fault("coremltools", "9.0"),
    "executorch_integers": Fault("executorch", "1.5"),
    "executorch_pad": Fault("executorch", "1.5"),
    "executorch_strides": Fault("executorch", "1.5"),
    "executorch_truth": Fault("torchao", "0.18"),
    "fixed_roi_align": Fault("coremltools", "9.0"),
    "litert_axes": Fault("litert-torch", "0.10"),
    "litert_point": Fault("litert-torch", "0.10"),
    "litert_power": Fault("litert-torch", "0.10"),
}
"""Faults with a work-around here, in the modules of the formats or, the power, in ``students.memory``.

tests/deployment/test_workarounds.py reproduces them; see docs/export.md and docs/export_targets.md.
"""
_DECODERS = (modeling_sam3.Sam3DetrDecoder, modeling_sam3_lite_text.Sam3LiteTextDetrDecoder)
_GEOMETRY = (modeling_sam3.Sam3GeometryEncoder, modeling_sam3_lite_text.Sam3LiteTextGeometryEncoder)
_POSITIONS = (
    modeling_sam.SamPositionalEmbedding, modeling_sam2.Sam2PositionalEmbedding,
    modeling_sam3_tracker.Sam3TrackerPositionalEmbedding,
)  # fmt: skip
_dynamic = False


@contextmanager
def exporting(module: nn.Module, example: Sequence[Tensor], dynamic: bool) -> Iterator[None]:
    """Prepare ``module`` for tracing inside a ``with`` block, without gradients.

    The module runs once before, which fills caches of constants with tensors; in a trace they would be symbols.

    Args:
        module: The module that is exported.
        example: Its inputs in the trace.
        dynamic: Whether axes stay dynamic. Static exports need no operator of their own for ``regroup``.
    """
    global _dynamic
    before, _dynamic = _dynamic, dynamic and FAULTS["reshape"].present
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, _DECODERS) and FAULTS["coordinates"].present:
                stack.enter_context(replaced(part, "_get_coords", _grid()))
            if isinstance(part, _GEOMETRY) and FAULTS["boxes" if dynamic else "fixed_roi_align"].present:
                stack.enter_context(replaced(part, "_encode_boxes", _pooled(part, dynamic)))
            if isinstance(part, _POSITIONS) and not dynamic and FAULTS["litert_point"].present:
                stack.enter_context(replaced(part, "forward", _rows(part)))
        stack.enter_context(torch.no_grad())
        try:
            module(*example)
            yield
        finally:
            _dynamic = before


@contextmanager
def replaced(owner: Any, name: str, method: Any) -> Iterator[None]:
    """Replace a method of one module or class inside a ``with`` block."""
    before = vars(owner).get(name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


def _grid() -> Callable[..., tuple[Tensor, Tensor]]:
    """``_get_coords`` of transformers' DETR decoder (5.24) for a grid whose sides are those of the first call.

    The method counts up to a tensor (``torch.arange(0, height)``), so the length of its result depends on data, and
    torch.export stops at a guard in the attention.
    """
    sides: list[int] = []

    def coords(height: Tensor, width: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        if not sides:
            sides.extend((int(height), int(width)))
        rows, columns = (torch.arange(side, device=device, dtype=dtype) / side for side in sides)
        return rows, columns

    return coords


def _pooled(encoder: Any, dynamic: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """``_encode_boxes`` of transformers' geometry encoder (5.24), with the boxes of all prompts in one call.

    The method gives ``roi_align`` a list with the boxes of each prompt (``unbind(0)``), which fixes the number of
    prompts. The formats with fixed axes have no ``roi_align``.
    """
    pool = pool_aligned if dynamic else pool_by_products

    def encode(
        boxes: Tensor, boxes_mask: Tensor, boxes_labels: Tensor, vision_features: Tensor
    ) -> tuple[Tensor, Tensor]:
        prompts, count = boxes.shape[:2]
        height, width = vision_features.shape[-2:]
        x, y, w, h = boxes.unbind(-1)
        left, right, top, bottom = x - 0.5 * w, x + 0.5 * w, y - 0.5 * h, y + 0.5 * h
        corners = torch.stack([left * width, top * height, right * width, bottom * height], -1)
        pooled = pool(vision_features, corners, encoder.roi_size)
        content = encoder.boxes_pool_project(pooled).view(prompts, count, encoder.hidden_size)
        places = encoder._encode_box_coordinates(x.flatten(), y.flatten(), w.flatten(), h.flatten())
        place = encoder.boxes_pos_enc_project(places.view(prompts, count, places.shape[-1]))
        embedded = encoder.boxes_direct_project(boxes) + content + place
        return encoder.label_embed(boxes_labels.long()) + embedded, boxes_mask

    return encode


def _rows(embedding: Any) -> Callable[..., Tensor]:
    """``forward`` of the positional embedding of points, with the coordinates as rows of one matrix.

    litert-torch (0.10) cannot convert a product of (1, 1, 1, 2) and a matrix, which is that of one point.
    """

    def embed(coordinates: Tensor, input_shape: tuple[int, int] | None = None) -> Tensor:
        height, width = (1, 1) if input_shape is None else input_shape
        places = 2 * torch.stack([coordinates[..., 0] / width, coordinates[..., 1] / height], -1) - 1
        angles = 2 * math.pi * (places.reshape(-1, 2) @ embedding.positional_embedding)
        return torch.cat([angles.sin(), angles.cos()], -1).reshape(*coordinates.shape[:-1], -1)

    return embed


@torch.library.custom_op("samdistill::regroup", mutates_args=())
def _regroup(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return x.reshape(sizes).clone()


@_regroup.register_fake
def _(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return x.new_empty(sizes)


def regroup(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Reshape ``x`` to ``sizes``.

    torch.export (2.14) records the number of elements of both sides of a reshape as an equation between axes, and so
    merges two axes that are equal in the example although one of them may also be 0. In a dynamic export the reshape is
    therefore an operator of its own, without that equation.
    """
    return _regroup(x, sizes) if _dynamic else x.reshape(sizes)


def translations() -> dict[Any, Callable[..., Any]]:
    """Return ONNX functions for operators that onnxscript lacks or translates wrongly.

    onnxscript (0.7, ``aten_repeat_interleave_self_int``) puts the count one axis too early if it is a number of the
    graph; a constant one is right. The tile then raises for a batch of more than one, and at batch = repeats = 2 it is
    wrong without an error. Its GELU is right, but in a form that onnxruntime does not fuse: a RepViT takes a third more
    time.
    """
    from onnxscript import opset18 as op
    from onnxscript.function_libs.torch_lib.ops.nn import aten_gelu

    def row(size: Any) -> Any:
        """A number, of the graph or of Python, as a vector of one element."""
        return (
            op.Constant(value_ints=[size]) if isinstance(size, int) else op.Reshape(size, op.Constant(value_ints=[1]))
        )

    def repeat_interleave(self: Any, repeats: Any, dim: int | None = None, output_size: Any = None) -> Any:
        if dim is None:
            self, dim, rank = op.Reshape(self, op.Constant(value_ints=[-1])), 0, 1
        else:
            rank = len(self.shape)
        after = dim % rank + 1
        before, rest = op.Shape(self, start=0, end=after - 1), op.Shape(self, start=after, end=rank)
        wide = op.Concat(op.Shape(self, start=0, end=after), row(repeats), rest, axis=0)
        copies = op.Expand(op.Unsqueeze(self, op.Constant(value_ints=[after])), wide)
        return op.Reshape(copies, op.Concat(before, op.Constant(value_ints=[-1]), rest, axis=0))

    def regrouped(x: Any, sizes: Sequence[Any]) -> Any:
        return op.Reshape(x, op.Concat(*map(row, sizes), axis=0), allowzero=1)

    def gelu(self: Any, approximate: str = "none") -> Any:
        """GELU in the order of products that onnxruntime fuses: (x (1 + erf)) 0.5, not x (0.5 (1 + erf))."""
        if approximate != "none":
            return aten_gelu(self, approximate)
        grown = op.Add(op.Erf(op.Div(self, op.Constant(value_float=math.sqrt(2)))), op.Constant(value_float=1.0))
        return op.Mul(op.Mul(self, grown), op.Constant(value_float=0.5))

    found: dict[Any, Callable[..., Any]] = {_regroup._opoverload: regrouped, torch.ops.aten.gelu.default: gelu}
    if FAULTS["repeat_interleave"].present:
        found[torch.ops.aten.repeat_interleave.self_int] = repeat_interleave
    return found
