"""``train.qat``: roundings are onnxruntime's, and a run with them is resumable and ends with a plain student."""

import json
import math
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime import InferenceSession
from onnxruntime.quantization.quant_utils import compute_scale_zp, get_qmin_qmax_for_qType
from torch import nn
from toy_task import StopAt, ToyTask, toy_config, toy_yaml

from samdistill.engine import Checkpoint, Interrupted, check_terms, fit, read_lines
from samdistill.engine.quantised import MOMENTUM, Quantisation, rounded_input, rounded_weight
from samdistill.types import UserError


def run(folder, task=None, resume=None, **changes):
    config = toy_config(**{"qat": 4} | changes)
    fit(task or ToyTask(), config, folder, resume, 0, toy_yaml(config))
    return vars(Checkpoint.load(folder / f"ckpt_epoch_{config.total_epochs}.pt"))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    return all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def quantise_dequantise(x, scales, zeros, kind, axis=None):
    """What onnxruntime's QuantizeLinear and DequantizeLinear give."""
    more = {} if axis is None else {"axis": axis}
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **more),
             helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **more)]  # fmt: skip
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name in "xy"]
    values = [helper.make_tensor("s", TensorProto.FLOAT, scales.shape, scales),
              helper.make_tensor("z", kind, zeros.shape, zeros)]  # fmt: skip
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


def of_range(low, high, kind, reduced, symmetric):
    """Scale and zero point that onnxruntime's quantiser chooses for a range of values."""
    ends = get_qmin_qmax_for_qType(kind, reduce_range=reduced, symmetric=symmetric)
    zero, scale = compute_scale_zp(np.float32(low), np.float32(high), *ends, symmetric)
    return np.float32(scale), int(zero)


@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.9), (0.0, 5.0), (-0.01, 0.0), (0.4, 3.0), (-3.0, -0.4)])
def test_an_input_is_rounded_as_onnxruntime_does(low, high):
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * (high - low)
    scale, zero = of_range(low, high, TensorProto.UINT8, False, False)
    expected = quantise_dequantise(x.numpy(), np.array(scale), np.array(zero), TensorProto.UINT8)
    found = rounded_input(x, torch.tensor([-low, high]).clamp(min=0)).numpy()
    apart = np.abs(found - expected)
    assert apart.max() <= 1.001 * scale, "a value between two steps can go to either"
    assert (apart > 1e-6 * max(-low, high)).mean() < 0.01


@pytest.mark.parametrize(
    "layer", [nn.Linear(7, 5), nn.Conv2d(4, 6, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv1d(3, 2, 1)]
)
def test_a_weight_is_rounded_as_onnxruntime_does(layer):
    weight = layer.weight.detach()
    ends = [of_range(one.min(), one.max(), TensorProto.INT8, True, True) for one in weight]
    scales, zeros = (np.array(part) for part in zip(*ends, strict=True))
    expected = quantise_dequantise(weight.numpy(), scales, zeros, TensorProto.INT8, 0)
    assert np.allclose(rounded_weight(weight).numpy(), expected, atol=1e-7)
    assert len(np.unique((expected.reshape(len(scales), -1) / scales[:, None]).round())) <= 129


def test_gradients_pass_where_values_are_in_range():
    x = torch.tensor([-2.0, -0.5, 0.3, 4.0], requires_grad=True)
    rounded_input(x, torch.tensor([1.0, 1.0])).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    weight = torch.tensor([[1.0, 0.013, -0.5]], requires_grad=True)
    rounded_weight(weight).sum().backward()
    assert weight.grad.tolist() == [[1, 1, 1]]


def test_ranges_follow_the_inputs_and_stop_at_the_end():
    student = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)).train()
    keys, quantised = list(student.state_dict()), Quantisation(student, student, 1, 21)
    seen = torch.tensor([[-1.0, 3.0]])
    ends = []
    for step, scale in enumerate((9.0, 1.0, 2.0, *[1.0] * 18)):
        quantised.begin(step)
        student(seen[:, :1].repeat(1, 2) * scale)  # two micro-batches
        student(seen[:, 1:].repeat(1, 2) * scale)
        quantised.update()
        ends.append(quantised.extents[0].tolist())
    assert all(math.isnan(value) for value in ends[0]) and ends[1] == [1, 3], "the first step with roundings"
    assert ends[2] == pytest.approx([1 + MOMENTUM, 3 + 3 * MOMENTUM])
    assert ends[18] != ends[17] and ends[20] == ends[19] == ends[18] and quantised.fixed == 19
    assert list(student.state_dict()) == keys and isinstance(student[0], nn.Linear)


def test_layers_compute_with_roundings_and_evaluation_leaves_ranges():
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    quantised = Quantisation(student, student, 0, 10)
    x = torch.randn(5, 3, 3, 3)
    quantised.measure(lambda: student.train()(x))
    extents = quantised.extents.clone()
    found = student.eval()(2 * x)
    conv, linear = student[0], student[2]
    inner = nn.functional.conv2d(
        rounded_input(2 * x, extents[0]), rounded_weight(conv._parameters["weight"]), conv.bias
    )
    weight = rounded_weight(linear._parameters["weight"])
    assert torch.equal(found, nn.functional.linear(rounded_input(inner.flatten(1), extents[1]), weight, linear.bias))
    quantised.update()
    assert torch.equal(quantised.extents, extents) and len(quantised) == 2


def test_layers_that_are_not_exported_are_left_alone():
    student = nn.ModuleDict({"kept": nn.Linear(2, 2), "lost": nn.Linear(2, 2)})
    assert len(Quantisation(student, student["kept"], 0, 1)) == 1 and type(student["lost"]) is nn.Linear
    assert len(Quantisation(student, student, None, 1)) == 0


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    """Interrupted within the quantised steps, and continued from an epoch before and after they begin."""
    whole = run(tmp_path / "whole", ema=0.9)
    assert whole["ranges"].isfinite().all() and whole["ranges"].shape == (2, 2)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", StopAt(at=8), ema=0.9)
    assert same(whole, run(tmp_path / "stopped", ema=0.9))
    for epoch in (1, 2):
        shutil.copytree(tmp_path / "whole", tmp_path / f"from{epoch}")
        for later in range(epoch + 1, 4):
            (tmp_path / f"from{epoch}" / f"ckpt_epoch_{later}.pt").unlink()
        assert same(whole, run(tmp_path / f"from{epoch}", ema=0.9))


def test_roundings_begin_at_their_step_and_a_plain_student_leaves(tmp_path):
    plain, quantised = (run(tmp_path / name, qat=qat) for name, qat in (("plain", None), ("quantised", 7)))
    terms = [[line["terms"] for line in read_lines(tmp_path / name / "metrics.jsonl") if "terms" in line]
             for name in ("plain", "quantised")]  # fmt: skip
    assert terms[0][:7] == terms[1][:7] and terms[0][7:] != terms[1][7:]
    assert list(plain["model"]) == list(quantised["model"]) and plain["ranges"] is None
    assert "2 layer(s) compute in int8 from step 8" in (tmp_path / "quantised" / "log_rank0.txt").read_text()


def test_micro_batches_have_the_ranges_of_the_whole_batch(tmp_path):
    one, two = (
        run(tmp_path / str(parts), ToyTask(dropout=0.0, norm="group"), accumulate=parts, qat=True) for parts in (1, 2)
    )
    assert torch.allclose(one["ranges"], two["ranges"], rtol=1e-3)


def test_check_differentiates_through_the_roundings():
    plain, quantised = (check_terms(ToyTask(dropout=0.0), "cpu", 4, 0, toy_config(qat=qat)) for qat in (None, 9))
    assert quantised.ok and not quantised.dead
    for before, after in zip(plain.terms, quantised.terms, strict=True):
        assert after.value != before.value and after.value == pytest.approx(before.value, rel=0.05)
    assert not check_terms(ToyTask(broken="detached"), "cpu", 4, 0, toy_config(qat=True)).ok


def test_settings(tmp_path):
    assert [toy_config(qat=given).qat for given in (True, False, None, 0, 1)] == [0, None, None, 0, 1]
    with pytest.raises(ValueError, match="exclude each other"):
        toy_config(qat=True, compile=True)
    with pytest.raises(UserError, match=r"train\.qat=15: the run has 15 steps; begin earlier"):
        run(tmp_path, qat=15)
    assert json.loads(json.dumps(toy_config(qat=True).model_dump(mode="json")))["qat"] == 0
