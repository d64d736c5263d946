"""OpenVINO files (``NAME.xml`` with its weights in ``NAME.bin``), run on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from .onnx import Onnx
from .parts import Part
from .programs import quiet, telling
from .targets import TARGETS, Contents, Session, extra

CPU_SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "SNIPPETS_MODE": "DISABLE", "PERFORMANCE_HINT": "LATENCY"}
"""Settings of the CPU plugin for answers that equal the model's.

On processors with bfloat16 units the plugin computes float32 models in bfloat16 unless it is told not to. With snippets
(2026.4.1) a baked detector gives wrong answers from the second call on; see docs/export_targets.md.
"""


@TARGETS.register("openvino")
class OpenVino:
    """OpenVINO's intermediate representation, converted from the ONNX file of the same part."""

    extension, needs, ran_here = ".xml", ("openvino", "onnx", "onnxscript"), True
    install, precisions = extra("openvino"), ("fp32",)

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


def halve(path: Path, to: Path) -> None:
    """Write a file again with weights in float16. They are computed with in the precision of the device.

    Args:
        path: A file with weights in float32.
        to: The new file.
    """
    import openvino

    openvino.save_model(openvino.Core().read_model(path), to, compress_to_fp16=True)


def quantise(path: Path, to: Path, samples: Iterable[Sequence[np.ndarray]]) -> None:
    """Write a file again with weights and activations in int8, by NNCF's post-training quantisation.

    Args:
        path: A file with weights in float32.
        to: The new file.
        samples: Inputs on held-out data, in the order of the file's inputs. A few hundred images are enough.
    """
    import nncf
    import openvino

    model = openvino.Core().read_model(path)
    names = [port.get_any_name() for port in model.inputs]
    given = [dict(zip(names, sample, strict=True)) for sample in samples]
    with quiet():
        small = nncf.quantize(model, nncf.Dataset(given), subset_size=len(given))
    openvino.save_model(small, to, compress_to_fp16=False)
