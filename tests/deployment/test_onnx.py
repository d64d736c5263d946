"""ONNX files of small models against eager, with the gate's own cases, and the work-arounds one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parts_toy import toy_part
from tiny_students import tiny_detector
from torch import Tensor, nn

from samdistill.deployment import workarounds
from samdistill.deployment.gate import LIMITS, check
from samdistill.deployment.onnx import Onnx
from samdistill.deployment.parts import Part, ports
from samdistill.deployment.parts_detector import bake, detector_parts
from samdistill.deployment.parts_promptable import promptable_parts
from samdistill.inference.concepts import StudentDetector
from samdistill.students import MobileSamConfig, MobileSamModel


def exported(part: Part, folder: Path, static: bool = False):
    path = folder / f"{part.name}.onnx"
    Onnx.convert(part, path, static)
    return check(part, path, Onnx, static, LIMITS["fp32"])


@pytest.mark.parametrize("static", [False, True])
def test_a_part_keeps_its_axes_or_loses_all(static: bool, tmp_path: Path) -> None:
    part = toy_part()
    part = replace(part, cases=(part.traced,)) if static else part
    verdict, contents = exported(part, tmp_path, static)
    assert verdict.passed, verdict.problems
    assert contents.opset == 18 and contents.operators["Conv"] == 1
    assert contents.inputs["prompts"] == ((2, 3, 4) if static else ("batch", "prompts", 4))


def test_a_frozen_axis_is_named(tmp_path: Path) -> None:
    """A file whose axes are fixed, where dynamic ones were asked for."""
    part, path = toy_part(), tmp_path / "toy.onnx"
    Onnx.convert(part, path, True)
    verdict, _ = check(part, path, Onnx, False, LIMITS["fp32"])
    assert verdict.problems[0] == "the axis 'batch' of pixels is fixed at 2" and verdict.comparisons == 0


class Repeats(nn.Module):
    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        return (x.repeat_interleave(like.shape[1], 0),)


def test_repeat_interleave_is_right_for_a_batch(tmp_path: Path) -> None:
    """At a batch of 2 with 2 repeats, onnxscript's own translation is wrong without an error."""
    module = Repeats()

    def example(sizes, seed: int):
        return torch.arange(sizes["a"] * 6.0).view(sizes["a"], 3, 2) + seed, torch.zeros(1, sizes["b"])

    part = Part(
        "repeats", module, (*ports(["x"], "a", 3, 2), *ports(["like"], 1, "b")), ports(["y"], "ab", 3, 2), example,
        {"a": 2, "b": 3}, ({"a": 2, "b": 2}, {"a": 3, "b": 2}, {"a": 1, "b": 4}), module,
    )  # fmt: skip
    verdict, _ = exported(part, tmp_path)
    assert verdict.passed and verdict.difference == 0, verdict.problems


def test_work_arounds_leave_the_module_as_it_was() -> None:
    x, sizes = torch.arange(6.0), (2, 3)
    with workarounds.exporting(nn.ReLU(), [x], True):
        assert torch.equal(workarounds.regroup(x, sizes), x.view(2, 3))
    assert workarounds._dynamic is False and torch.equal(workarounds.regroup(x, sizes), x.view(2, 3))


def test_prompts_of_a_small_mobile_sam(tmp_path: Path) -> None:
    """Points alone, boxes alone and both, of one or several prompts: all are one file."""
    torch.manual_seed(0)
    model = MobileSamModel(MobileSamConfig(backbone="es_rv_s", image_size=64, width=32, heads=2)).eval()
    del model.mask_decoder.transformer.layers[1:]
    part = promptable_parts(model, False)[1]
    verdict, contents = exported(part, tmp_path)
    assert verdict.passed, verdict.problems
    assert contents.inputs["input_boxes"] == ("batch", "prompts_of_boxes", 4)
    session = Onnx.open(tmp_path / f"{part.name}.onnx")
    given = [one.numpy() for one in part.example({"batch": 1, "prompts": 1, "points": 4, "boxes": 0}, 5)]
    assert session(*given)[1].shape == (1, 1, 3, 16, 16) and np.isfinite(session(*given)[1]).all()


@pytest.fixture(scope="module")
def remembering() -> StudentDetector:
    return tiny_detector(latents=12)


@pytest.mark.parametrize(
    ("name", "words"), [("decoder_boxes", ()), ("decoder_memory", ("red circle", "star")), ("memory", ())]
)
def test_a_detector(remembering: StudentDetector, name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    """Any number of images, prompts, boxes, objects and frames, also with baked words."""
    baked = bake(remembering, words) if words else None
    part = next(part for part in detector_parts(remembering, baked, False) if part.name == name)
    verdict, contents = exported(part, tmp_path)
    assert verdict.passed, verdict.problems
    axes = {axis for shape in contents.inputs.values() for axis in shape if isinstance(axis, str)}
    assert axes == set(part.axes)


def test_baked_words_are_one_file(tmp_path: Path) -> None:
    """All of a detector, with fixed axes."""
    student = tiny_detector()
    (part,) = detector_parts(student, bake(student, ("red circle", "star")), True)
    verdict, contents = exported(part, tmp_path, static=True)
    assert verdict.passed, verdict.problems
    assert contents.inputs == {"pixel_values": (1, 3, 64, 64), "concepts": (1,), "prompt_images": (1,)}


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_one_operator_in_onnxruntime(approximate: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    module = nn.Sequential(nn.Linear(4, 4), nn.GELU(approximate)).eval()
    given = torch.linspace(-4, 4, 12).reshape(3, 4)
    shape = ("batch", 4)
    part = Part(
        "gelu", module, ports(["x"], *shape), ports(["y"], *shape), lambda sizes, seed: (given,), {"batch": 3},
        ({"batch": 3},), module,
    )  # fmt: skip
    Onnx.convert(part, tmp_path / "gelu.onnx", False)
    assert torch.allclose(
        torch.from_numpy(Onnx.open(tmp_path / "gelu.onnx")(given.numpy())[0]), module(given), atol=1e-6
    )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "gelu.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "fused.onnx")).graph.node}
    assert approximate == "tanh" or (kinds & {"Gelu", "BiasGelu"} and "Erf" not in kinds)
