"""OpenVINO files (``NAME.xml`` with its weights in ``NAME.bin``), run on the CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .onnx import Onnx
from .parts import Part, samples
from .precision import SMALL
from .programs import quiet, telling
from .targets import TARGETS, Contents, Session, extra

CPU_SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "SNIPPETS_MODE": "DISABLE", "PERFORMANCE_HINT": "LATENCY"}
"""Settings of the CPU plugin for answers that equal the model's.

On processors with bfloat16 units the plugin computes float32 models in bfloat16 unless it is told not to. With snippets
(2026.4.1) a baked detector gives wrong answers from the second call on; see docs/export_targets.md.
"""

QUANTISED = frozenset({"Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul", "Gather"})
"""Operators that are quantised: convolutions, matrix products and tables of embeddings."""
_NO_VALUES = frozenset({"Parameter", "Result", "Constant"})


@TARGETS.register("openvino")
class OpenVino:
    """OpenVINO's intermediate representation, converted from the ONNX file of the same part."""

    extension, needs, ran_here = ".xml", ("openvino", "nncf", "onnx", "onnxscript"), True
    install, precisions = extra("openvino"), ("fp32", "fp16", "int8")

    @staticmethod
    def convert(part: Part, path: Path, static: bool) -> None:
        """Convert a part. It has the axes, names and work-arounds of the ONNX export.

        Raises:
            UserError: The part cannot be exported to ONNX, or has an operator that OpenVINO does not have.
        """
        import openvino

        with TemporaryDirectory() as folder:
            source = Path(folder) / "model.onnx"
            Onnx.convert(part, source, static)
            with telling(part, "OpenVINO"), quiet():
                model = openvino.convert_model(source)
        openvino.save_model(model, path, compress_to_fp16=False)

    @staticmethod
    def reduce(part: Part, source: Path, path: Path, precision: str, pixels: Tensor | None) -> None:
        """Write weights in float16, which the device computes with as it likes, or weights and activations in int8.

        Raises:
            UserError: NNCF cannot quantise the part.
        """
        import openvino

        model = openvino.Core().read_model(source)
        if precision == "int8":
            assert pixels is not None
            model = _quantised(part, model, pixels)
        openvino.save_model(model, path, compress_to_fp16=precision == "fp16")

    @staticmethod
    def open(path: Path) -> Session:
        """Compile a file for the CPU, with as many threads as torch uses."""
        import openvino

        settings = {**CPU_SETTINGS, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.Core().compile_model(path, "CPU", settings)
        ports = range(len(compiled.outputs))

        def run(*inputs: np.ndarray) -> list[np.ndarray]:
            found = compiled([np.ascontiguousarray(one) for one in inputs])
            return [found[port] for port in ports]

        return run

    @staticmethod
    def read(path: Path) -> Contents:
        """Read inputs and operators. OpenVINO files have no names of axes, so a dynamic one is ``?``."""
        import openvino

        model = openvino.Core().read_model(path)
        inputs = {port.get_any_name(): tuple(map(_length, port.partial_shape)) for port in model.inputs}
        operators = Counter(one.get_type_name() for one in model.get_ops())
        return Contents(inputs, dict(sorted(operators.items())))


def _length(dimension: Any) -> int | str:
    return "?" if dimension.is_dynamic else dimension.get_length()


def _quantised(part: Part, model: Any, pixels: Tensor) -> Any:
    """Return a model with weights and activations in int8, by NNCF's post-training quantisation.

    The operators and the 7-bit weights are those of the int8 ONNX files, see ``precision``.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    names = [port.get_any_name() for port in model.inputs]
    given = [dict(zip(names, sample, strict=True)) for sample in samples(part, pixels)]
    with quiet(), telling(part, "int8 by NNCF"):
        return nncf.quantize(
            model, nncf.Dataset(given), subset_size=len(given), preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=_left_out(model),
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
        )  # fmt: skip


def _left_out(model: Any) -> Any:
    """Return NNCF's scope of what stays fp32: all but ``QUANTISED``, and layers of at most ``SMALL`` weights."""
    import nncf

    operators = list(model.get_ordered_ops())
    others = {one.get_type_name() for one in operators} - QUANTISED - _NO_VALUES
    weighted = [one for one in operators if one.get_type_name() in QUANTISED]
    small = [one.get_friendly_name() for one in weighted if 0 < _weights(one) <= SMALL]
    return nncf.IgnoredScope(types=sorted(others), names=small, validate=False)


def _weights(operator: Any) -> int:
    """Return the number of weights of an operator. 0 for a product of two activations."""
    constants = [
        port.get_source_output().get_node().data.size for port in operator.inputs()
        if port.get_source_output().get_node().get_type_name() == "Constant"
    ]  # fmt: skip
    return max(constants, default=0)
