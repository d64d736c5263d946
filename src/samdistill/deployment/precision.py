"""ONNX files in reduced precision: fp16, and int8 with ranges from real images.

int8 is onnxruntime's static quantisation of convolutions and matrix products, with 7-bit weights (``reduce_range``):
processors without VNNI add pairs of products in 16 bits, which 8-bit weights overflow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..types import UserError
from .parts import Part, samples

QUANTISED = ["Conv", "MatMul", "Gemm"]
"""Operators that are quantised. Other operators lose more than they save."""
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

    blocked = [*DEFAULT_OP_BLOCK_LIST, *_KEPT]
    made = convert_float_to_float16(onnx.load(str(source)), keep_io_types=True, op_block_list=blocked)
    onnx.save(made, str(path))


class _Reader:
    """Gives the calibration inputs of a part one by one."""

    def __init__(self, inputs: Sequence[dict[str, np.ndarray]]) -> None:
        self._inputs = iter(inputs)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._inputs, None)


def _quantise(part: Part, source: Path, path: Path, pixels: Tensor) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, names = path.with_name(f"{path.name}.prepared"), [port.name for port in part.inputs]
    given = [dict(zip(names, sample, strict=True)) for sample in samples(part, pixels)]
    try:
        with _quiet():
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared), str(path), _Reader(given),  # type: ignore[arg-type]
                quant_format=QuantFormat.QDQ, op_types_to_quantize=QUANTISED, per_channel=True, reduce_range=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
    finally:
        prepared.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the advice that onnxruntime logs with every quantisation."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def needs_images(precisions: Sequence[str], data: Any) -> None:
    """Raise ``UserError`` unless calibration data are given exactly if a precision needs them."""
    if "int8" in precisions and data is None:
        raise UserError("--precision int8: give --calibrate with images, from which it takes the ranges of values")
    if "int8" not in precisions and data is not None:
        raise UserError("--calibrate: only --precision int8 has a use for it; leave it out")
