"""LiteRT files (``NAME.tflite``) for Android and microcontrollers, run on the CPU with XNNPACK."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .parts import Part
from .programs import dotted, plain, quiet, refuse_dynamic, telling
from .targets import TARGETS, Contents, Session
from .workarounds import exporting

ENVIRONMENT = (
    "python -m venv litert && litert/bin/pip install samdistill 'litert-torch>=0.10,<0.11' 'pydantic<2.12' "
    "'typing-extensions<4.13' && litert/bin/samdistill export ..."
)
"""The commands that make an environment for LiteRT and export in it. Its converter needs older libraries."""

_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED")
QUANTISED = {"fp16": _WEIGHTED, "int8": (*_WEIGHTED, "BATCH_MATMUL")}
"""Operators that are smaller in each precision."""


@TARGETS.register("litert")
class LiteRt:
    """LiteRT (TensorFlow Lite) through ``litert_torch``."""

    extension, needs, ran_here = ".tflite", ("litert_torch", "ai_edge_litert"), True
    install, precisions = f"in an environment of its own: {ENVIRONMENT}", ("fp32", "fp16", "int8")

    @staticmethod
    def convert(part: Part, path: Path, static: bool) -> None:
        """Convert a part with fixed axes. Names of inputs have no dots: ``image_embeddings_0``.

        Raises:
            UserError: An axis is dynamic, or the part has an operator that LiteRT does not have.
        """
        refuse_dynamic(part, static, "LiteRT", "its converter cannot lower a layer with a dynamic axis")
        with quiet():
            import litert_torch

        example = tuple(one.contiguous() for one in part.example(part.traced, 0))
        given = {plain(port.name): one for port, one in zip(part.inputs, example, strict=True)}
        with exporting(part.module, example, False), quiet(), telling(part, "LiteRT"):
            model = litert_torch.convert(_Named(part.module, tuple(given)).eval(), sample_kwargs=given)
            model.export(str(path))

    @staticmethod
    def reduce(part: Part, source: Path, path: Path, precision: str, pixels: Tensor | None) -> None:
        """Write weights in float16, which are computed with in float32, or in int8.

        With int8 weights the runtime computes in int8 too, with ranges of activations that it takes anew in every run.
        Fixed ranges from ``pixels`` agreed less for MobileSAM's encoder, and made a larger file.

        Raises:
            UserError: The quantiser cannot quantise the part.
        """
        with quiet():
            from ai_edge_quantizer import qtyping, quantizer
            from ai_edge_quantizer.algorithm_manager import AlgorithmName

        with telling(part, f"{precision} in LiteRT"), quiet():
            made = quantizer.Quantizer(str(source))
            for name in map(qtyping.TFLOperationName, QUANTISED[precision]):
                if precision == "int8":
                    made.add_dynamic_config(".*", name, num_bits=8)
                else:
                    whole = qtyping.QuantGranularity.TENSORWISE
                    made.add_weight_only_config(".*", name, 16, whole, AlgorithmName.FLOAT_CASTING)
            made.quantize({}).export_model(str(path), overwrite=True)

    @staticmethod
    def open(path: Path) -> Session:
        """Load a file, with as many threads as torch uses."""
        interpreter = _interpreter(path)
        interpreter.allocate_tensors()
        places = interpreter.get_input_details()
        outputs = interpreter.get_signature_runner().get_output_details()
        order = [outputs[name]["index"] for name in sorted(outputs, key=lambda name: int(name.rsplit("_", 1)[-1]))]

        def run(*inputs: np.ndarray) -> list[np.ndarray]:
            for place, one in zip(places, inputs, strict=True):
                interpreter.set_tensor(place["index"], one.astype(place["dtype"], copy=False))  # int64 is int32 there
            interpreter.invoke()
            return [interpreter.get_tensor(place) for place in order]

        return run

    @staticmethod
    def read(path: Path) -> Contents:
        """Read inputs and operators."""
        interpreter = _interpreter(path)
        inputs: dict[str, tuple[int | str, ...]] = {
            dotted(port["name"].removeprefix("serving_default_").removesuffix(":0")): tuple(
                "?" if size < 0 else int(size) for size in port["shape_signature"]
            )
            for port in interpreter.get_input_details()
        }
        operators = Counter(one["op_name"] for one in interpreter._get_ops_details())
        return Contents(inputs, dict(sorted(operators.items())))


class _Named(nn.Module):
    """A module whose inputs have names, which the converter writes into the file."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, **given: Tensor) -> Any:
        return self.module(*(given[name] for name in self.names))


def _interpreter(path: Path) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(str(path), num_threads=torch.get_num_threads())
