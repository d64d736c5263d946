"""The targets beside ONNX: what each refuses, and a small part converted and compared where a library is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samdistill import UserError
from samdistill.deployment import targets
from samdistill.deployment.gate import LIMITS, check
from samdistill.deployment.parts import Part, Port, ports
from samdistill.deployment.programs import dotted, plain
from samdistill.deployment.targets import TARGETS, target

FIXED = ("coreml", "executorch", "litert")
RAN = ("executorch", "litert", "openvino")


class Small(nn.Module):
    """A layer with an index, a truth value and two outputs, as the decoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(5, 8), nn.Linear(8, 8)

    def forward(self, features: Tensor, index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.mix(features).masked_fill(~valid[:, None], 0.0) + self.table(index)
        return mixed, mixed.softmax(-1)


def example(sizes: dict[str, int], seed: int) -> tuple[Tensor, ...]:
    draw, count = torch.Generator().manual_seed(seed), sizes["batch"]
    index = torch.randint(5, (count,), generator=draw)
    return torch.randn(count, 8, generator=draw), index, torch.rand(count, generator=draw) < 0.7


def small(static: bool) -> Part:
    torch.manual_seed(0)
    module = Small().eval()
    inputs = (
        *ports(["features.0"], "batch", 8), *ports(["index"], "batch", dtype=torch.int64),
        Port("valid", torch.bool, ("batch",)),
    )  # fmt: skip
    cases = ({"batch": 2},) if static else ({"batch": 1}, {"batch": 2}, {"batch": 3})
    outputs = ports(["mixed", "shares"], "batch", 8)
    return Part("small", module, inputs, outputs, example, {"batch": 2}, cases, module)


def needs(name: str) -> None:
    if missing := [module for module in TARGETS.get(name).needs if find_spec(module) is None]:
        pytest.skip(f"{missing[0]} is not installed")


@pytest.mark.parametrize("name", FIXED)
def test_a_dynamic_axis_is_refused_with_its_reason_before_anything_is_imported(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^small: the axis batch must be fixed for .*, because .*; add --static$"):
        TARGETS.get(name).convert(small(False), tmp_path / "small", False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("openvino", "pip install 'samdistill[openvino]'"), ("executorch", "pip install 'samdistill[executorch]'"),
        ("coreml", "pip install 'samdistill[coreml]'"), ("litert", "in an environment of its own: "),
    ],
)  # fmt: skip
def test_a_missing_library_is_one_line_that_installs_it(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda module: None)
    with pytest.raises(UserError) as caught:
        target(name)
    assert said in str(caught.value) and str(caught.value).startswith(f"--to {name} needs ")
    assert "\n" not in str(caught.value)


def test_names_with_the_number_of_a_level_come_back_from_names_without_dots() -> None:
    names = ["pixel_values", "image_embeddings.0", "vision_features.2", "memory_tokens"]
    assert [dotted(plain(name)) for name in names] == names
    assert not any("." in plain(name) for name in names)


@pytest.mark.parametrize("name", RAN)
def test_a_small_part_passes_the_gate(name: str, tmp_path: Path) -> None:
    needs(name)
    static, kind = name in FIXED, TARGETS.get(name)
    part, path = small(static), tmp_path / f"small{kind.extension}"
    kind.convert(part, path, static)
    verdict, contents = check(part, path, kind, static, LIMITS["fp32"])
    assert verdict.passed and verdict.ran and verdict.comparisons == 4 * len(part.cases), verdict.problems
    assert contents.inputs["features.0"] == ((2, 8) if static else ("?", 8)) and contents.operators


@pytest.mark.parametrize("name", ("onnx", *RAN))
def test_a_file_reads_an_input_by_its_strides(name: str, tmp_path: Path) -> None:
    """ExecuTorch's binding reads the memory from its start, as if the array were contiguous."""
    needs(name)
    kind, part, path = TARGETS.get(name), small(True), tmp_path / f"small{TARGETS.get(name).extension}"
    kind.convert(part, path, True)
    run, (features, index, valid) = kind.open(path), (one.numpy() for one in example({"batch": 2}, 3))
    backwards = np.ascontiguousarray(features[::-1, ::-1])[::-1, ::-1]
    turned = np.asfortranarray(features)
    assert not turned.flags.c_contiguous and not backwards.flags.c_contiguous
    wanted = part.module(*map(torch.from_numpy, (features, index, valid)))[0].detach().numpy()
    for given in (turned, backwards):
        np.testing.assert_allclose(run(given, index, valid)[0], wanted, rtol=1e-4, atol=1e-5)


def test_a_core_ml_package_has_the_inputs_and_says_that_it_was_not_run(tmp_path: Path) -> None:
    needs("coreml")
    kind, path = TARGETS.get("coreml"), tmp_path / ".small.mlpackage.zip"
    kind.convert(small(True), path, True)
    verdict, contents = check(small(True), path, kind, True, LIMITS["fp32"])
    assert verdict.passed and not verdict.ran and verdict.comparisons == 0
    assert list(contents.inputs) == ["features.0", "index", "valid"] and contents.operators["linear"] == 1


PIXELS = torch.zeros(16, 3, 8, 8)  # the small part takes its features from the seed
REDUCED = [(name, precision) for name in TARGETS.names() for precision in TARGETS.get(name).precisions[1:]]


class Wide(nn.Module):
    """Layers whose weights are most of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))

    def forward(self, features: Tensor) -> tuple[Tensor]:
        return (self.mix(features),)


def wide(static: bool) -> Part:
    torch.manual_seed(0)
    module = Wide().eval()

    def drawn(sizes: dict[str, int], seed: int) -> tuple[Tensor]:
        return (torch.randn(sizes["batch"], 256, generator=torch.Generator().manual_seed(seed)),)

    given, made = ports(["features"], "batch", 256), ports(["mixed"], "batch", 256)
    return Part("wide", module, given, made, drawn, {"batch": 2 - static}, ({"batch": 1},), module)


@pytest.mark.parametrize(("name", "precision"), REDUCED)
def test_a_reduced_file_is_small_and_agrees(name: str, precision: str, tmp_path: Path) -> None:
    needs(name)
    static, kind = name in FIXED, TARGETS.get(name)
    part = wide(static)
    whole, made = (tmp_path / f"{stem}{kind.extension}" for stem in ("whole", "made"))
    kind.convert(part, whole, static)
    kind.reduce(part, whole, made, precision, PIXELS)
    verdict, contents = check(part, made, kind, static, LIMITS[precision])
    assert verdict.passed, verdict.problems
    assert verdict.ran == kind.ran_here and contents.inputs["features"] == ((1, 256) if static else part_axes(name))
    before, after = (sum(one.stat().st_size for one in tmp_path.glob(f"{stem}.*")) for stem in ("whole", "made"))
    assert after < (0.3 if precision == "int8" else 0.6) * before


def part_axes(name: str) -> tuple[int | str, ...]:
    return ("batch" if name == "onnx" else "?", 256)
