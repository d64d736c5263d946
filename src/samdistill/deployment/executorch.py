"""ExecuTorch files (``NAME.pte``) for phones, with XNNPACK as the CPU's backend."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from .parts import Part, samples
from .programs import program, quiet, refuse_dynamic, telling
from .targets import TARGETS, Contents, Session, extra

NAMES = "input_names"
"""Method of a file that returns the names of its inputs, with commas between. The format itself has only positions."""

SAME_RANGE = (torch.ops.aten.contiguous.default, torch.ops.aten.pad.default)
"""Operators whose result has the range of their input, and that the quantizer of ExecuTorch does not know as such."""

NOTE = "quantization_annotation"
"""Key under which torchao's quantizers say how a node is quantised."""


@TARGETS.register("executorch")
class ExecuTorch:
    """ExecuTorch through ``torch.export``. Operators that XNNPACK lacks run in the portable kernels."""

    extension, needs, ran_here = ".pte", ("executorch",), True
    install, precisions = extra("executorch"), ("fp32", "int8")

    @staticmethod
    def convert(part: Part, path: Path, static: bool) -> None:
        """Convert a part with fixed axes.

        Raises:
            UserError: An axis is dynamic, or the part has an operator that ExecuTorch does not have.
        """
        refuse_dynamic(
            part,
            static,
            "ExecuTorch",
            "an axis needs a largest size, for which the file has memory, and the file does not say which axes vary",
        )
        _write(part, program(part), path)

    @staticmethod
    def reduce(part: Part, source: Path, path: Path, precision: str, pixels: Tensor | None) -> None:
        """Trace again, with weights and activations in int8 where XNNPACK computes with them.

        Raises:
            UserError: The part has an operator that torchao or ExecuTorch does not have.
        """
        assert precision == "int8" and pixels is not None
        with quiet():
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        given = [tuple(map(torch.from_numpy, sample)) for sample in samples(part, pixels)]
        with telling(part, "int8 in ExecuTorch"), quiet(), torch.no_grad():
            watched = prepare_pt2e(program(part).module(), _quantizer())
            for one in given:
                watched(*one)
            small = torch.export.export(convert_pt2e(watched), given[0], strict=False)
        _write(part, small, path)

    @staticmethod
    def open(path: Path) -> Session:
        """Load a file. All files of this process then run with as many threads as torch uses."""
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

        _unsafe_reset_threadpool(torch.get_num_threads())
        method = Runtime.get().load_program(path).load_method("forward")
        assert method is not None

        def run(*inputs: np.ndarray) -> list[np.ndarray]:
            found = method.execute([torch.from_numpy(np.ascontiguousarray(one)) for one in inputs])
            return [one.numpy().copy() for one in found]  # the next call writes into the same memory

        return run

    @staticmethod
    def read(path: Path) -> Contents:
        """Read inputs, operators and the parts that XNNPACK runs, counted as ``XnnpackBackend``."""
        from executorch.exir._serialize._program import deserialize_pte_binary

        plans = {plan.name: plan for plan in deserialize_pte_binary(path.read_bytes()).program.execution_plan}
        names = _value(plans[NAMES], plans[NAMES].outputs[0]).string_val.split(",")
        plan = plans["forward"]
        shapes = [tuple(_value(plan, place).sizes) for place in plan.inputs]
        inputs: dict[str, tuple[int | str, ...]] = dict(zip(names, shapes, strict=True))
        operators = Counter(_operator(plan, call.instr_args) for chain in plan.chains for call in chain.instructions)
        return Contents(inputs, dict(sorted((name, n) for name, n in operators.items() if name)))


def _quantizer() -> Any:
    """Return XNNPACK's quantizer, for values of floating point only and with one range before and after a pad.

    As it is, it turns the numbers that are added to integers into float32, also those of an index, and asks for the
    ranges of truth values. A pad behind ``contiguous`` gets an int8 input and a float32 output, and the file does not
    load.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, SharedQuantizationSpec

    class OfFloats(XNNPACKQuantizer):
        def transform_for_annotation(self, model: GraphModule) -> GraphModule:
            found = super().transform_for_annotation(model)
            for node in _of_integers(found):
                for given in node.all_input_nodes:
                    if str(given.target).startswith("_tensor_constant_"):
                        number = found.get_buffer(given.target)
                        setattr(found, given.target, number.to(node.meta["val"].dtype))
            return found

        def annotate(self, model: GraphModule) -> GraphModule:
            found = super().annotate(model)
            for node in _of_integers(found):
                node.meta.pop(NOTE, None)
            for node in found.graph.nodes:
                before = node.args[0] if node.target in SAME_RANGE else None
                if isinstance(before, Node) and getattr(before.meta.get(NOTE), "output_qspec", None) is not None:
                    same = SharedQuantizationSpec(before)
                    node.meta[NOTE] = QuantizationAnnotation({before: same}, same, _annotated=True)
            return found

    return OfFloats().set_global(get_symmetric_quantization_config(is_per_channel=True))


def _of_integers(model: GraphModule) -> list[Node]:
    """Return the operators of a graph that return integers or truth values."""
    values = [(node, node.meta.get("val")) for node in model.graph.nodes if node.op == "call_function"]
    return [node for node, value in values if isinstance(value, Tensor) and not value.is_floating_point()]


def _write(part: Part, traced: ExportedProgram, path: Path) -> None:
    """Lower a program to XNNPACK and write it."""
    import executorch.kernels.quantized  # noqa: F401  for conversions to and from int8 that XNNPACK leaves over
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    with telling(part, "ExecuTorch"), quiet():
        lowered = to_edge_transform_and_lower(
            traced, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods={NAMES: ",".join(port.name for port in part.inputs)},
        )  # fmt: skip
        path.write_bytes(lowered.to_executorch().buffer)


def _value(plan: Any, place: int) -> Any:
    return plan.values[place].val


def _operator(plan: Any, call: Any) -> str:
    """Return the name of what an instruction runs. Empty for jumps and releases of memory."""
    if hasattr(call, "op_index"):
        return str(plan.operators[call.op_index].name)
    return str(plan.delegates[call.delegate_index].id) if hasattr(call, "delegate_index") else ""
