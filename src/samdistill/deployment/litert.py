"""LiteRT files (``NAME.tflite``) for Android and microcontrollers, run on the CPU with XNNPACK."""

from __future__ import annotations

from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..types import UserError
from .parts import Part
from .programs import dotted, plain, quiet, refuse_dynamic, telling
from .targets import TARGETS, Contents, Session
from .workarounds import exporting

ENVIRONMENT = (
    "python -m venv litert && litert/bin/pip install samdistill 'litert-torch>=0.10,<0.11' && "
    "litert/bin/samdistill export ..."
)
"""The commands that make an environment for LiteRT and export in it. Its converter needs an older pydantic."""


@TARGETS.register("litert")
class LiteRt:
    """LiteRT (TensorFlow Lite) through ``litert_torch``."""

    extension, needs, ran_here = ".tflite", ("litert_torch", "ai_edge_litert"), True
    install, precisions = f"in an environment of its own: {ENVIRONMENT}", ("fp32",)

    @staticmethod
    def convert(part: Part, path: Path, static: bool) -> None:
        """Convert a part with fixed axes. Names of inputs have no dots: ``image_embeddings_0``.

        Raises:
            UserError: An axis is dynamic, or the part has an operator that LiteRT does not have.
        """
        refuse_dynamic(part, static, "LiteRT", "its converter needs the sizes of every reshape")
        with quiet():
            import litert_torch

        example = tuple(one.contiguous() for one in part.example(part.traced, 0))
        given = {plain(port.name): one for port, one in zip(part.inputs, example, strict=True)}
        with exporting(part.module, example, False), quiet(), telling(part, "LiteRT"), redirect_stdout(StringIO()):
            model = litert_torch.convert(_Named(part.module, tuple(given)).eval(), sample_kwargs=given)
            model.export(str(path))

    @staticmethod
    def reduce(part: Part, source: Path, path: Path, precision: str, pixels: Tensor | None) -> None:
        """Raises ``UserError``: there is fp32 alone."""
        raise UserError(f"{part.name}: {precision} is not available for LiteRT")

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
