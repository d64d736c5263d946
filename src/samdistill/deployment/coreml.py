"""Core ML packages (``NAME.mlpackage``, in a zip file) for Apple devices. They are converted here, not run."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..types import UserError
from .parts import Part
from .programs import dotted, plain, program, quiet, refuse_dynamic, telling
from .targets import TARGETS, Contents, Session, extra
from .workarounds import FAULTS

_MODEL = "Data/com.apple.CoreML/model.mlmodel"
_FIXED = "an axis needs a largest size there, and only its default size runs on the Neural Engine"
_SMALLEST = 512  # weights with fewer elements stay as they are in int8
_DTYPES = {torch.float32: np.float32, torch.int64: np.int32, torch.bool: np.float32}


@TARGETS.register("coreml")
class CoreMl:
    """An ML program for iOS 17 and macOS 14. Whole numbers are int32, and yes or no is 1.0 or 0.0.

    In fp16 it also computes in float16. In int8 it has the weights of fp32 as 8-bit numbers, each output channel with a
    scale of its own: ranges of activations need a run, and so a Mac.
    """

    extension, needs, ran_here = ".mlpackage.zip", ("coremltools",), False
    install, precisions = extra("coreml"), ("fp32", "fp16", "int8")

    @staticmethod
    def convert(part: Part, path: Path, static: bool) -> None:
        """Convert a part with fixed axes.

        Names of inputs have no dots in Core ML: ``image_embeddings.0`` is ``image_embeddings_0`` there.

        Raises:
            UserError: An axis is dynamic, the part has an operator that Core ML does not have, or the package has other
                outputs than the part.
        """
        refuse_dynamic(part, static, "Core ML", _FIXED)
        _convert(part, path, "FLOAT32")

    @staticmethod
    def reduce(part: Part, source: Path, path: Path, precision: str, pixels: Tensor | None) -> None:
        """Convert again for fp16, or write the weights of the fp32 package in int8.

        Raises:
            UserError: The part has an operator that Core ML does not have.
        """
        if precision == "fp16":
            return _convert(part, path, "FLOAT16")
        with quiet():
            import coremltools as ct
            from coremltools.optimize import coreml as smaller

        weights = smaller.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=_SMALLEST)
        with telling(part, "int8 in Core ML"), quiet(), TemporaryDirectory() as folder, zipfile.ZipFile(source) as file:
            file.extractall(folder)
            whole = ct.models.MLModel(str(next(Path(folder).glob("*.mlpackage"))), skip_model_load=True)
            made = smaller.linear_quantize_weights(whole, smaller.OptimizationConfig(global_config=weights))
            package = Path(folder) / "reduced.mlpackage"
            made.save(str(package))
            pack(package, path)

    @staticmethod
    def open(path: Path) -> Session:
        """Raises ``UserError``: Core ML runs on Apple devices alone."""
        raise UserError(f"{path.name}: Core ML runs on Apple devices alone")

    @staticmethod
    def read(path: Path) -> Contents:
        """Read inputs and operators. ``convert`` checks the outputs."""
        with quiet():
            from coremltools.proto.Model_pb2 import Model

        with zipfile.ZipFile(path) as file:
            inside = next(name for name in file.namelist() if name.endswith(_MODEL))
            model = Model.FromString(file.read(inside))
        inputs = {dotted(port.name): tuple(port.type.multiArrayType.shape) for port in model.description.input}
        operators = Counter(_operators(model.mlProgram))
        return Contents(inputs, dict(sorted(operators.items())))


def _convert(part: Part, path: Path, precision: str) -> None:
    """Convert a part with fixed axes. Inputs and outputs are float32 in any precision."""
    with quiet():
        import coremltools as ct

    traced = mended(program(part, _Numbers(part)).run_decompositions())
    example = part.example(part.traced, 0)
    inputs = [
        ct.TensorType(name=plain(port.name), shape=tuple(one.shape), dtype=_DTYPES[port.dtype])
        for port, one in zip(part.inputs, example, strict=True)
    ]
    with telling(part, "Core ML"), quiet(), torch.no_grad(), TemporaryDirectory() as folder:
        model = ct.convert(
            traced, inputs=inputs,
            outputs=[ct.TensorType(name=plain(port.name), dtype=np.float32) for port in part.outputs],
            compute_precision=ct.precision[precision], minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
        )  # fmt: skip
        _check_outputs(part, model.get_spec(), [tuple(one.shape) for one in part.module(*example)])
        package = Path(folder) / "model.mlpackage"
        model.save(str(package))
        pack(package, path)


class _Numbers(nn.Module):
    """A part whose inputs of type bool are numbers, and whose int64 inputs are int32 in the file."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.module, self.truths = part.module, [port.dtype == torch.bool for port in part.inputs]

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*(one > 0 if truth else one for one, truth in zip(inputs, self.truths, strict=True)))


def _check_outputs(part: Part, spec: Any, shapes: list[tuple[int, ...]]) -> None:
    there = {port.name: tuple(port.type.multiArrayType.shape) for port in spec.description.output}
    wanted = {plain(port.name): shape for port, shape in zip(part.outputs, shapes, strict=True)}
    if there != wanted:
        raise UserError(f"{part.name}: the outputs of the Core ML package are {there}, not {wanted}")


def mended(traced: ExportedProgram) -> ExportedProgram:
    """Rewrite what Core ML's converter (9.0) cannot take; no value changes. See ``FAULTS``.

    It has no ``alias`` and no ``bitwise_or``, which is only used for truth values here. It gives sums of truth values
    the type float32, so indices of ``scatter`` that are computed from one need a conversion to whole numbers.
    """
    graph, aten = traced.graph_module.graph, torch.ops.aten
    for node in list(graph.nodes):
        if node.target in (aten.alias.default, aten.detach.default) and FAULTS["coreml_alias"].present:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.bitwise_or.Tensor and FAULTS["coreml_bitwise_or"].present:
            node.target = aten.logical_or.default
        elif node.target in (aten.scatter.src, aten.scatter.value) and FAULTS["coreml_scatter"].present:
            values, axis, index, *rest = node.args
            with graph.inserting_before(node):
                whole = graph.call_function(aten._to_copy.default, (index,), {"dtype": torch.int64})
            whole.meta.update(index.meta)
            node.args = (values, axis, whole, *rest)
    return traced


def pack(package: Path, path: Path) -> None:
    """Write a package into a zip file, with the folder's name that the file's name has.

    The dates inside are fixed, so that equal packages give equal files.
    """
    name = path.name.lstrip(".").removesuffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for one in sorted(package.rglob("*")):
            if one.is_file():
                file.writestr(zipfile.ZipInfo(f"{name}/{one.relative_to(package)}"), one.read_bytes())


def _operators(program: Any) -> Iterator[str]:
    for function in program.functions.values():
        for block in function.block_specializations.values():
            yield from _of_block(block)


def _of_block(block: Any) -> Iterator[str]:
    for operation in block.operations:
        yield operation.type
        for inner in operation.blocks:
            yield from _of_block(inner)
