"""ONNX files in reduced precision: fp16, and int8 with ranges from real images.

int8 is onnxruntime's static quantisation of convolutions and matrix products, with 7-bit weights (``reduce_range``):
processors without VNNI add pairs of products in 16 bits, which 8-bit weights overflow. Ranges of inputs are
percentiles, because single outliers widen the range of smallest and largest value with every further image; a part for
which onnxruntime cannot take percentiles gets smallest and largest values. Matrix products return float32: their
kernels need no quantised output, and what follows them (biases, norms, softmax) would lose by it.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..types import UserError
from .parts import Part, samples
from .programs import telling

QUANTISED = ["Conv", "MatMul", "Gemm"]
"""Operators that are quantised. Other operators lose more than they save."""
_TABLE = "Gather"
"""Lookup in a table of token embeddings or of text features, which can be most of a file."""
_PRODUCTS = ["MatMul", "Gemm"]
SMALL = 1024
"""Layers of at most this many weights stay fp32. They save nothing, and the most sensitive ones are among them: the
first convolutions, and what reads or writes coordinates and scores.
"""
_PERCENTILE = 99.99
_FLOAT, _HALF = 1, 10  # onnx.TensorProto.FLOAT and FLOAT16
_KEPT = ("Resize", "GridSample", "RoiAlign", "TopK", "CumSum", "Range")
"""Operators that stay fp32 in an fp16 file: coordinates need more than 11 bits."""


def reduce(part: Part, source: Path, path: Path, precision: str, pixels: Tensor | None) -> None:
    """Write an fp32 ONNX file in another precision. Inputs and outputs keep their types.

    Args:
        part: What the file was made of.
        source: The fp32 file.
        path: The file to write.
        precision: ``fp16`` or ``int8``.
        pixels: Calibration images, for ``int8``.
    """
    if precision == "fp16":
        _half(source, path)
    else:
        assert pixels is not None
        _quantise(part, source, path, pixels)


def _half(source: Path, path: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    model, blocked = onnx.load(str(source)), [*DEFAULT_OP_BLOCK_LIST, *_KEPT]
    kept = _of_coordinates(model.graph)
    made = convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked, node_block_list=kept)
    _skip_halves(made.graph)
    onnx.save(made, str(path))


def _skip_halves(graph: Any) -> None:
    """Give float32 operators float32 where the converter goes through float16.

    It converts the output of every float32 operator and every input of the file to float16, also for the next float32
    operator, so that a coordinate of 1000 pixels would be rounded to half a pixel.
    """
    types = {node.output[0]: (node, node.attribute[0].i) for node in graph.node if node.op_type == "Cast"}
    for node, kind in types.values():
        before, half = types.get(node.input[0], (None, 0))
        if kind == _FLOAT and half == _HALF:
            node.input[0] = before.input[0]
    used = {name for node in graph.node for name in node.input} | {port.name for port in graph.output}
    for node in [node for node, _ in types.values() if node.output[0] not in used]:
        graph.node.remove(node)


def _of_coordinates(graph: Any) -> list[str]:
    """Return the names of the operators that compute arguments of a sine or cosine, back to the last large layer.

    The arguments are coordinates times up to tens of turns. float16 would round them to hundredths of a turn.
    """
    makers = {name: node for node in graph.node for name in node.output}
    large = {one.name for one in graph.initializer if math.prod(one.dims) > SMALL}
    left = [node for node in graph.node if node.op_type in ("Sin", "Cos")]
    found: dict[str, Any] = {}
    while left:
        node = left.pop()
        if node.name not in found and large.isdisjoint(node.input):
            found[node.name] = node
            left += [makers[name] for name in node.input if name in makers]
    return list(found)


class _Reader:
    """Gives the calibration inputs of a part one by one. ``set_range`` selects some of them."""

    def __init__(self, inputs: Sequence[dict[str, np.ndarray]]) -> None:
        self._inputs, self._left = inputs, iter(inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._inputs[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def _quantise(part: Part, source: Path, path: Path, pixels: Tensor) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, names = path.with_name(f"{path.name}.prepared"), [port.name for port in part.inputs]
    given = [dict(zip(names, sample, strict=True)) for sample in samples(part, pixels)]
    try:
        with _quiet(), telling(part, "int8"):
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            try:
                _calibrate(prepared, path, given, CalibrationMethod.Percentile)
            except (ValueError, MemoryError):
                # A histogram has no bins of finite width, or too many, where all values of the first image are nearly 0
                _calibrate(prepared, path, given, CalibrationMethod.MinMax)
    finally:
        prepared.unlink(missing_ok=True)
    made = onnx.load(str(path))
    _shorten(made.graph)
    onnx.save(made, str(path))


def _calibrate(source: Path, path: Path, given: Sequence[dict[str, np.ndarray]], method: Any) -> None:
    """Write a file with weights and activations in int8, by one of onnxruntime's ways to choose ranges."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    options = {
        "CalibPercentile": _PERCENTILE, "OpTypesToExcludeOutputQuantization": _PRODUCTS,
        "CalibStridedMinMax": 1,  # an image at a time, with any method: all at once would hold every tensor of all
    }  # fmt: skip
    quantize_static(
        str(source), str(path), _Reader(given),  # type: ignore[arg-type]
        quant_format=QuantFormat.QDQ, op_types_to_quantize=[*QUANTISED, _TABLE],
        nodes_to_exclude=_left_out(onnx.load(str(source)).graph), per_channel=True, reduce_range=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=method, extra_options=options,
    )  # fmt: skip


def _left_out(graph: Any) -> list[str]:
    """Return the names of the operators that stay fp32: of at most ``SMALL`` weights, and lookups in no table."""
    floats = {one.name: math.prod(one.dims) for one in graph.initializer if one.data_type == 1}

    def kept(node: Any) -> bool:
        if node.op_type == _TABLE:
            return floats.get(node.input[0], 0) <= SMALL
        return node.op_type in QUANTISED and floats.get(node.input[1], SMALL + 1) <= SMALL

    return [node.name for node in graph.node if kept(node)]


def _shorten(graph: Any) -> None:
    """Give the tensors of a graph short names, except inputs and outputs, and write equal constants once.

    Quantisation adds a thousand tensors to a detector, whose names are a tenth of a small file, and many of its zero
    points are equal. A graph with subgraphs, which may read any tensor by its name, is left as it is.
    """
    from onnx import numpy_helper

    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return
    given = {port.name for port in (*graph.input, *graph.output)} | {""}
    names, kept = dict[str, str](), dict[Any, str]()
    for tensor in (one for one in graph.initializer if one.name not in given):
        values = numpy_helper.to_array(tensor)
        names[tensor.name] = kept.setdefault((values.dtype.str, values.shape, values.tobytes()), f"c{len(kept)}")

    def short(name: str) -> str:
        return name if name in given else names.setdefault(name, f"t{len(names)}")

    for node in graph.node:
        node.name = ""
        for tensors in (node.input, node.output):
            tensors[:] = [short(name) for name in tensors]
    constants = {short(tensor.name): tensor for tensor in graph.initializer}
    for name, tensor in constants.items():
        tensor.name = name
    once = [type(tensor).FromString(tensor.SerializeToString()) for tensor in constants.values()]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(once)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the advice that onnxruntime logs with every quantisation, and the progress that it prints."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def needs_images(precisions: Sequence[str], data: Any) -> None:
    """Raise ``UserError`` unless calibration data are given exactly if a precision needs them."""
    if "int8" in precisions and data is None:
        raise UserError("--precision int8: give --calibrate with images, from which it takes the ranges of values")
    if "int8" not in precisions and data is not None:
        raise UserError("--calibrate: only --precision int8 has a use for it; leave it out")
