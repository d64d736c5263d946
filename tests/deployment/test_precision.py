"""Files in reduced precision: what is rounded, with which ranges, and what the files hold besides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from samdistill.deployment.onnx import Onnx
from samdistill.deployment.parts import Part, pictures, ports
from samdistill.deployment.precision import _left_out, reduce
from samdistill.engine.quantised import rounded_weight

SIDE, IMAGES = 32, 12


class Net(nn.Module):
    """A layer that is too small to be quantised, a convolution, and a matrix product with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small, self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 64, 3), nn.Linear(64, 40)

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        return (self.linear(self.conv(self.small(pixels)).relu().flatten(2).transpose(1, 2)),)


@pytest.fixture(scope="module")
def part() -> Part:
    module = Net().eval()
    return Part(
        "net", module, ports(["pixels"], "batch", 3, SIDE, SIDE), ports(["out"], "batch", (SIDE - 2) ** 2, 40),
        lambda sizes, seed: (pictures(sizes["batch"], SIDE, seed),), {"batch": 2}, ({"batch": 1},), module,
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(part: Part, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp32") / "net.onnx"
    Onnx.convert(part, path, False)
    return path


def made(part: Part, source: Path, path: Path, precision: str, pixels: Tensor | None = None) -> onnx.ModelProto:
    reduce(part, source, path, precision, pixels)
    return onnx.load(str(path))


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}


def images(seed: int = 9) -> Tensor:
    return torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def test_no_file_has_a_path_of_this_machine(source: Path) -> None:
    """torch writes the stack trace of every operator into the file, a quarter of a small one."""
    assert b"test_precision" not in source.read_bytes() and b"site-packages" not in source.read_bytes()


def test_int8_weights_are_those_that_training_for_int8_computes_with(
    part: Part, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = made(part, source, tmp_path / "net.onnx", "int8", images())
    assert capfd.readouterr().out == "", "onnxruntime prints its progress"
    known, found = values(model), {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and known.get(node.input[0], np.zeros(0)).dtype == np.int8:
            axis = next((one.i for one in node.attribute if one.name == "axis"), 1)
            whole, scale = known[node.input[0]], known[node.input[1]]
            shape = [-1 if at == axis else 1 for at in range(whole.ndim)]
            assert abs(whole).max() <= 64 and not known[node.input[2]].any()
            found[whole.shape] = whole * scale.reshape(shape)
    net = part.module
    assert set(found) == {(64, 4, 3, 3), (64, 40)}, "the layer of 12 weights stays fp32"
    assert np.allclose(found[64, 4, 3, 3], rounded_weight(net.conv.weight).detach(), atol=1e-6)
    assert np.allclose(found[64, 40], rounded_weight(net.linear.weight).detach().T, atol=1e-6)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["QuantizeLinear"] == 3, "inputs of both layers and the output of the convolution"
    assert all(len(name) < 5 for node in model.graph.node for name in (node.name, *node.input, *node.output)
               if name not in ("pixels", "out"))  # fmt: skip
    constants = [(one.dtype.str, one.shape, one.tobytes()) for one in known.values()]
    assert len(constants) == len(set(constants)), "equal constants stand in the file once"


def test_int8_is_close_to_eager_at_any_batch(part: Part, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    reduce(part, source, path, "int8", images())
    assert Onnx.read(path).inputs == {"pixels": ("batch", 3, SIDE, SIDE)}
    session, given = Onnx.open(path), images(1)[:3]
    wanted = part.module(given)[0].detach().numpy()
    assert np.abs(session(given.numpy())[0] - wanted).max() < 0.05 * np.abs(wanted).max()


def test_one_outlier_does_not_widen_a_range(part: Part, source: Path, tmp_path: Path) -> None:
    """A single pixel in 24576 that is 30 times brighter than all others."""

    def step(pixels: Tensor) -> float:
        """Step of the convolution's input."""
        model = made(part, source, tmp_path / "net.onnx", "int8", pixels)
        return float(values(model)[next(n for n in model.graph.node if n.op_type == "QuantizeLinear").input[1]])

    odd = torch.cat([images(), images(1)])
    usual = step(odd)
    odd[3, :, 5, 5] = 100
    assert step(odd) < 1.5 * usual


def test_an_image_of_nearly_zero_has_no_percentiles_and_stops_nothing(tmp_path: Path) -> None:
    """numpy cannot divide a range of 1e-43 into bins, nor one of 1 into bins of that width."""
    module = nn.Sequential(nn.Conv2d(3, 64, 3, bias=False)).eval()
    part = Part(
        "net", module, ports(["pixels"], "batch", 3, SIDE, SIDE), ports(["out"], "batch", 64, SIDE - 2, SIDE - 2),
        lambda sizes, seed: (pictures(sizes["batch"], SIDE, seed),), {"batch": 2}, ({"batch": 1},), module,
    )  # fmt: skip
    source, pixels = tmp_path / "net.onnx", images()
    Onnx.convert(part, source, False)
    path = tmp_path / "int8.onnx"
    reduce(part, source, path, "int8", torch.cat([pixels[:1] * 1e-43, pixels]))
    wanted = module(pixels).detach().numpy()
    (found,) = Onnx.open(path)(pixels.numpy())
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_small_layers_and_lookups_of_indices_stay_as_they_are() -> None:
    """Products of two activations are quantised, and tables of text."""

    def tensor(name: str, *shape: int, kind: int = TensorProto.FLOAT) -> onnx.TensorProto:
        return helper.make_tensor(name, kind, shape, np.zeros(shape).ravel())

    tables = [tensor("large", 32, 33), tensor("small", 32, 32), tensor("rows", 40, 40, kind=TensorProto.INT64)]
    given = {"MatMul": ("x large", "x small", "x x"), "Gemm": ("x small b",), "Conv": ("x large", "x small"),
             "Gather": ("large i", "small i", "rows i", "x i"), "Add": ("x small",)}  # fmt: skip
    nodes = [helper.make_node(kind, inputs.split(), [f"{kind}{n}"], name=f"{kind} {inputs}")
             for kind, some in given.items() for n, inputs in enumerate(some)]  # fmt: skip
    assert _left_out(helper.make_graph(nodes, "g", [], [], tables)) == [
        "MatMul x small", "Gemm x small b", "Conv x small", "Gather small i", "Gather rows i", "Gather x i",
    ]  # fmt: skip


def test_fp16_keeps_the_arguments_of_a_sine_exact(tmp_path: Path) -> None:
    """float16 would round an argument of 300 to a quarter of a radian."""

    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.large, self.small = nn.Linear(64, 64), nn.Linear(64, 2)

        def forward(self, given: Tensor) -> tuple[Tensor]:
            return (300 * self.small(given)).sin(), self.large(given)

    module = Waves().eval()
    part = Part(
        "waves", module, ports(["given"], "batch", 64), (*ports(["waves"], "batch", 2), *ports(["sums"], "batch", 64)),
        lambda sizes, seed: (torch.rand(sizes["batch"], 64, generator=torch.Generator().manual_seed(seed)),),
        {"batch": 2}, ({"batch": 1},), module,
    )  # fmt: skip
    source, path = tmp_path / "waves.onnx", tmp_path / "half.onnx"
    Onnx.convert(part, source, False)
    kinds = {one.dims[0]: one.data_type for one in made(part, source, path, "fp16").graph.initializer if one.dims}
    assert kinds[64] == TensorProto.FLOAT16
    (given,) = part.example({"batch": 8}, 0)
    found, wanted = Onnx.open(path)(given.numpy()), module(given)
    assert np.abs(found[0] - wanted[0].detach().numpy()).max() < 1e-3
    assert 1e-5 < np.abs(found[1] - wanted[1].detach().numpy()).max() < 1e-2


def test_fp16_halves_the_file_and_keeps_the_types_of_its_ports(part: Part, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    reduce(part, source, path, "fp16", None)
    assert {one.dtype for one in values(onnx.load(str(path))).values()} >= {np.dtype("float16")}
    found = Onnx.open(path)(images()[:1].numpy())[0]
    wanted = part.module(images()[:1])[0].detach().numpy()
    assert found.dtype == np.float32 and 0 < np.abs(found - wanted).max() < 5e-3 * np.abs(wanted).max()
