"""The faults for which there are work-arounds are still there. A test that fails here: remove its work-around."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_students import tiny_detector
from torch import Tensor, nn

from samdistill.deployment import executorch, workarounds
from samdistill.deployment.coreml import mended
from samdistill.deployment.onnx import _quiet
from samdistill.deployment.programs import quiet
from samdistill.deployment.regions import pool_aligned, pool_by_products


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def symbols(function: Callable[..., Tensor], *inputs: Tensor, free: tuple = ()) -> list[tuple]:
    """Trace a function with dynamic axes, and return the shapes of its inputs and of its output."""
    axes = [{axis: torch.export.Dim.AUTO for axis in some} for some in free] or [{} for _ in inputs]
    program = torch.export.export(Call(function), inputs, dynamic_shapes=(tuple(axes),), strict=False)
    given = program.graph_signature.user_inputs
    nodes = [node.meta["val"] for node in program.graph.nodes if node.name in given]
    nodes.append(next(reversed(program.graph.nodes)).args[0][0].meta["val"])
    return [tuple(map(str, node.shape)) for node in nodes]


def test_every_fault_has_a_test() -> None:
    here = {name.removeprefix("test_fault_") for name in globals() if name.startswith("test_fault_")}
    assert here == set(workarounds.FAULTS)
    assert all(fault.present for fault in workarounds.FAULTS.values())
    assert not workarounds.Fault("torch", "1.0", mended=(2, 0)).present
    assert workarounds.Fault("torch", "1.0", mended=(99, 0)).present


def test_fault_repeat_interleave() -> None:
    """The count is a number of the graph; with a constant one the translation is right."""

    def repeated(x: Tensor, like: Tensor) -> Tensor:
        return x.repeat_interleave(like.shape[1], 0)

    x, like = torch.arange(12.0).view(2, 3, 2), torch.zeros(1, 2)
    try:
        with _quiet():
            program = torch.onnx.export(
                Call(repeated), (x, like), dynamo=True, verbose=False, optimize=False,
                dynamic_shapes=(({0: "a"}, {1: "b"}),),
            )  # fmt: skip
        found = program(x, like)[0].numpy()
    except Exception:
        return
    wanted = repeated(x, like).numpy()
    assert found.shape != wanted.shape or not np.array_equal(found, wanted)


@pytest.mark.parametrize("decoder", workarounds._DECODERS)
def test_fault_coordinates(decoder: type) -> None:
    """The length of the result depends on the value of a tensor."""

    def coordinates(sizes: Tensor) -> Tensor:
        return decoder._get_coords(SimpleNamespace(), sizes[0], sizes[1], torch.float32, sizes.device)[0]

    try:
        shape = symbols(coordinates, torch.tensor([4, 5]))[-1]
    except Exception:
        return
    assert not shape[0].isdigit()


@pytest.mark.parametrize("encoder", workarounds._GEOMETRY)
def test_fault_boxes(encoder: type) -> None:
    """``roi_align`` gets a list, so the number of prompts is fixed."""
    model = tiny_detector().model.geometry_encoder
    width = model.hidden_size
    given = (torch.rand(3, 2, 4), torch.ones(3, 2).bool(), torch.ones(3, 2).long(), torch.rand(3, width, 6, 6))

    def encoded(*inputs: Tensor) -> Tensor:
        return encoder._encode_boxes(model, *inputs)[0]

    with torch.no_grad():
        assert symbols(encoded, *given, free=((0,),) * 4)[0][0] == "3"


def test_fault_reshape() -> None:
    """Two axes, of which one may also be 0, become one."""

    def grouped(points: Tensor, labels: Tensor) -> Tensor:
        return points.reshape(*labels.shape, 2)

    points, labels, _ = symbols(grouped, torch.zeros(2, 3, 5, 2), torch.zeros(2, 3, 5), free=((0, 1, 2),) * 2)
    assert points[1] == labels[1]


def coreml(function: Callable[..., Tensor], *inputs: Tensor, mend: bool = False) -> None:
    """Convert a function to Core ML."""
    if find_spec("coremltools") is None:
        pytest.skip("coremltools is not installed")
    import coremltools as ct

    traced = torch.export.export(Call(function), inputs, strict=False).run_decompositions()
    given = [ct.TensorType(shape=tuple(one.shape), dtype=_NUMBERS[one.dtype]) for one in inputs]
    with quiet():
        ct.convert(
            mended(traced) if mend else traced, inputs=given, minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
        )  # fmt: skip


def detached(index: Tensor) -> Tensor:
    return torch.ops.aten.alias(torch.arange(6.0).view(3, 2)).index_select(0, index)


def either(a: Tensor, b: Tensor) -> Tensor:
    return ((a > 0) | (b > 0)).float()


def counted(x: Tensor, values: Tensor) -> Tensor:
    return x.scatter(1, (x > 0).sum(1, keepdim=True), values)


_NUMBERS = {torch.float32: np.float32, torch.int64: np.int32}
_CORE_ML = {
    "alias": (detached, torch.tensor([2, 0])),
    "bitwise_or": (either, torch.randn(2, 3), torch.randn(2, 3)),
    "scatter": (counted, torch.tensor([[1.0, -1.0, -1.0], [1.0, 1.0, -1.0]]), torch.full((2, 1), 5.0)),
}
"""A function and its inputs by operator."""


@pytest.mark.parametrize("operator", _CORE_ML)
def test_the_rewrites_for_core_ml_change_no_value(operator: str) -> None:
    function, *inputs = _CORE_ML[operator]
    traced = torch.export.export(Call(function), tuple(inputs), strict=False).run_decompositions()
    before = traced.graph_module.code
    found = mended(traced).graph_module
    found.recompile()
    assert found.code != before
    assert torch.equal(traced.module()(*inputs), function(*inputs))


def test_fault_coreml_alias() -> None:
    """A buffer that is detached."""
    with pytest.raises(RuntimeError, match="Unsupported fx node alias"):
        coreml(*_CORE_ML["alias"])
    coreml(*_CORE_ML["alias"], mend=True)


def test_fault_coreml_bitwise_or() -> None:
    with pytest.raises(RuntimeError, match="Unsupported fx node bitwise_or"):
        coreml(*_CORE_ML["bitwise_or"])
    coreml(*_CORE_ML["bitwise_or"], mend=True)


def test_fault_coreml_scatter() -> None:
    """The sum of truth values has the type float32, and an index must be a whole number."""
    with pytest.raises(Exception, match="indices"):
        coreml(*_CORE_ML["scatter"])
    coreml(*_CORE_ML["scatter"], mend=True)


def litert(function: Callable[..., Tensor], given: Tensor, **options: object) -> None:
    """Convert a function to LiteRT."""
    if find_spec("litert_torch") is None:
        pytest.skip("litert_torch is not installed")
    import litert_torch

    litert_torch.convert(Call(function).eval(), (given,), **options)


def test_fault_litert_power() -> None:
    """A number to the power of whole numbers is float64, which LiteRT does not have. The memory has such a power."""
    with pytest.raises(ValueError, match="pow"):
        litert(lambda x: x * 0.5 ** torch.arange(4), torch.randn(3, 4))
    litert(lambda x: x * 0.5 ** torch.arange(4, dtype=torch.float32), torch.randn(3, 4))


def test_fault_litert_axes() -> None:
    """Neither a linear layer nor a reshape with a dynamic axis can be lowered."""

    def grouped(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], 2, 4)

    axes = {"inputs": ({0: torch.export.Dim("batch", min=2, max=8)},)}
    for function, given in ((nn.Linear(8, 4), torch.randn(3, 8)), (grouped, torch.randn(3, 5, 8))):
        with pytest.raises((AssertionError, TypeError)):
            litert(function, given, dynamic_shapes=axes)


def test_fault_litert_point() -> None:
    """The product of one point and a matrix is that of four axes and two; as rows of a matrix it can be converted."""
    weights = torch.randn(2, 8)

    def sines(points: Tensor) -> Tensor:
        return (2 * (points.clone() / 8) - 1).matmul(weights).sin()

    with pytest.raises(ValueError, match="batch_matmul"):
        litert(sines, torch.rand(1, 1, 1, 2))
    litert(lambda x: sines(x.reshape(-1, 2)).reshape(1, 1, 1, 8), torch.rand(1, 1, 1, 2))


class Given(nn.Module):
    """A linear layer, and a function of its input and its output."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.layer(x))


def quantised(module: nn.Module, given: Tensor, quantizer: Any, path: Path) -> Tensor:
    """Return what an int8 file of a module answers."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    with torch.no_grad():
        watched = prepare_pt2e(torch.export.export(module, (given,), strict=False).module(), quantizer)
        watched(given)
        small = torch.export.export(convert_pt2e(watched), (given,), strict=False)
    part: Any = SimpleNamespace(name="part", inputs=[SimpleNamespace(name="x")])
    executorch._write(part, small, path)
    return torch.from_numpy(executorch.ExecuTorch.open(path)(given.numpy())[0])


def compare_quantizers(function: Callable[[Tensor, Tensor], Tensor], said: str, folder: Path) -> None:
    """See that a module cannot be quantised for ExecuTorch with XNNPACK's quantizer, and can with ours."""
    if find_spec("executorch") is None:
        pytest.skip("executorch is not installed")
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer

    module, ours = Given(function).eval(), executorch._quantizer()
    given = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Exception, match=said):
        quantised(module, given, XNNPACKQuantizer().set_global(ours.global_config), folder / "theirs.pte")
    wanted = module(given).detach()
    assert (quantised(module, given, ours, folder / "ours.pte") - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_fault_executorch_integers(tmp_path: Path) -> None:
    """A number that is added to an index becomes float32."""
    compare_quantizers(lambda x, y: y + torch.eye(8)[torch.arange(4) + 1], "indices", tmp_path)


def test_fault_executorch_truth(tmp_path: Path) -> None:
    """Ranges are taken of truth values that are joined."""
    compare_quantizers(lambda x, y: y.masked_fill(torch.cat([x[:, :2] > 1, x[:, 2:] < -1], 1), 0.0), "Bool", tmp_path)


def test_fault_executorch_pad(tmp_path: Path) -> None:
    """A pad after ``contiguous`` gets an int8 input and a float32 output."""
    compare_quantizers(
        lambda x, y: nn.functional.pad(y.permute(0, 2, 1).contiguous(), (0, 0, 1, 0)).softmax(-1), "Failed", tmp_path
    )


def test_fault_executorch_strides(tmp_path: Path) -> None:
    """The binding reads an input from the start of its memory, in the order of a contiguous one."""
    if find_spec("executorch") is None:
        pytest.skip("executorch is not installed")
    from executorch.runtime import Runtime

    path, given = tmp_path / "part.pte", torch.arange(24.0).view(1, 3, 4, 2).permute(0, 3, 1, 2)
    part: Any = SimpleNamespace(name="part", inputs=[SimpleNamespace(name="x")])
    executorch._write(part, torch.export.export(Call(lambda x: x + 1), (given.contiguous(),), strict=False), path)
    found = Runtime.get().load_program(path).load_method("forward").execute([given])[0]
    assert not torch.equal(found, given + 1)
    assert np.array_equal(executorch.ExecuTorch.open(path)(given.numpy())[0], given.numpy() + 1)


def test_fault_fixed_roi_align() -> None:
    """Neither Core ML nor LiteRT has it."""
    features, box = torch.randn(1, 2, 4, 4), torch.tensor([[[0.0, 0.0, 3.0, 2.0]]])
    with pytest.raises(RuntimeError, match="Unsupported fx node roi_align"):
        coreml(lambda x, box: pool_aligned(x, box, 2), features, box)
    coreml(lambda x, box: pool_by_products(x, box, 2), features, box)


@pytest.mark.parametrize("kind", workarounds._POSITIONS)
@pytest.mark.parametrize("sides", [None, (32, 64)])
def test_positions_of_points_stay_the_same(kind: type[nn.Module], sides: tuple[int, int] | None) -> None:
    embedding = kind(SimpleNamespace(num_pos_feats=4, hidden_size=8, scale=0.5))
    points = 64 * torch.rand(2, 3, 5, 2)
    assert torch.allclose(workarounds._rows(embedding)(points, sides), embedding(points, sides), atol=1e-4)


def test_the_replaced_methods_are_there() -> None:
    for one in workarounds._DECODERS:
        assert list(inspect.signature(one._get_coords).parameters) == ["self", "height", "width", "dtype", "device"]
