"""ONNX files for onnxruntime, TensorRT and the browser."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..types import UserError
from . import precision as reduced
from . import workarounds
from .parts import Part
from .targets import TARGETS, Contents, Session, extra

OPSET = 18
MOST_BYTES = 2**31 - 2**20
"""Largest size of one file. Larger models would need a second file beside it."""


@TARGETS.register("onnx")
class Onnx:
    """ONNX through ``torch.onnx.export(dynamo=True)``, run with onnxruntime on the CPU."""

    extension, needs, ran_here = ".onnx", ("onnx", "onnxscript", "onnxruntime"), True
    install, precisions = extra("onnx"), ("fp32", "fp16", "int8")

    @staticmethod
    def convert(part: Part, path: Path, static: bool) -> None:
        """Export a part. All axes that it declares dynamic stay so, unless ``static``.

        Raises:
            UserError: torch fixes a dynamic axis, the model has an operator without an ONNX form, or it is too large.
        """
        size = sum(tensor.nbytes for tensor in part.module.state_dict().values())
        if size > MOST_BYTES:
            raise UserError(f"{part.name}: its weights have {size / 1e9:.1f} GB, and one ONNX file holds at most 2 GB")
        example = part.example(part.traced, 0)
        with workarounds.exporting(part.module, example, not static), _quiet():
            try:
                program = torch.onnx.export(
                    part.module, example, dynamo=True, opset_version=OPSET, verbose=False,
                    input_names=[port.name for port in part.inputs], output_names=[port.name for port in part.outputs],
                    dynamic_shapes=None if static else _dynamic(part),
                    custom_translation_table=workarounds.translations(),
                )  # fmt: skip
            except Exception as error:  # the exporter raises errors of many libraries, with the cause at the end
                raise UserError(f"{part.name}: cannot be exported to ONNX: {_cause(error)}") from error
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces: paths of this machine, a quarter of a small file
        program.save(path, external_data=False)

    @staticmethod
    def reduce(part: Part, source: Path, path: Path, precision: str, pixels: Tensor | None) -> None:
        """Write a file in fp16 or int8, see ``precision``."""
        reduced.reduce(part, source, path, precision, pixels)

    @staticmethod
    def open(path: Path) -> Session:
        """Open a file with as many threads as torch uses."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_inputs()]
        return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))

    @staticmethod
    def read(path: Path) -> Contents:
        """Read inputs, operators and opset from the file."""
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        inputs = {port.name: tuple(map(_length, port.type.tensor_type.shape.dim)) for port in model.graph.input}
        operators = Counter(_operators(model.graph))
        for function in model.functions:
            operators.update(_operators(function))
        opset = next(one.version for one in model.opset_import if one.domain == "")
        return Contents(inputs, dict(sorted(operators.items())), opset)


def _dynamic(part: Part) -> Any:
    """Return the names of the dynamic axes, in the structure of the module's arguments."""
    shapes = tuple(
        {number: axis for number, axis in enumerate(port.shape) if isinstance(axis, str)} for port in part.inputs
    )
    variadic = "inputs" in part.module.forward.__code__.co_varnames and part.module.forward.__code__.co_flags & 4
    return (shapes,) if variadic else shapes


def _length(dim: Any) -> int | str:
    return dim.dim_param if dim.HasField("dim_param") else int(dim.dim_value)


def _operators(graph: Any) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _operators(attribute.g)


def _cause(error: BaseException) -> str:
    """Return the first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress and its warnings about things that the gate checks."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    before = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
