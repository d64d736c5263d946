"""The gate lets a file through that equals eager, and no other."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parts_toy import Broken, Toy, eager_target, example, toy_part

from samdistill.deployment import gate
from samdistill.deployment.gate import LIMITS, Limits, check, cosine, difference, latency, mask_iou
from samdistill.deployment.parts import Part, ports

EXACT = LIMITS["fp32"]


def checked(part: Part, path: Path, broken: Broken = lambda call, found: found, static: bool = False):
    target = eager_target(part.module, broken)
    target.convert(part, path / "toy.json", static)
    return check(part, path / "toy.json", target, static, EXACT)[0]


def test_a_file_that_equals_eager_passes_and_its_time_is_taken(tmp_path: Path) -> None:
    part = toy_part()
    found = checked(part, tmp_path)
    assert found.passed and found.difference == 0 and found.agreement == pytest.approx(1)
    assert found.comparisons == len(part.cases) * 2 * 2  # inputs, each twice
    spent = found.milliseconds
    assert min(spent["file"], spent["eager"]) > 0 and spent["least"] <= spent["ratio"] <= spent["greatest"]


def test_a_perturbed_weight_is_refused(tmp_path: Path) -> None:
    part, damaged = toy_part(), Toy()
    with torch.no_grad():
        damaged.score.weight[0, 0] += 0.01
    target = eager_target(damaged)
    target.convert(part, tmp_path / "toy.json", False)
    found, _ = check(part, tmp_path / "toy.json", target, False, EXACT)
    assert not found.passed and "outputs differ by" in found.problems[0]


def late(call: int, found: list[np.ndarray]) -> list[np.ndarray]:
    """Right in the first call, as OpenVINO was."""
    return found if call == 1 else [one + 1 for one in found]


def at_two(call: int, found: list[np.ndarray]) -> list[np.ndarray]:
    """Wrong at a batch of 2 with 2 prompts alone, as onnxscript's repeat_interleave was."""
    return [one[:, ::-1] for one in found] if found[0].shape == (2, 2) else found


def nothing(call: int, found: list[np.ndarray]) -> list[np.ndarray]:
    return [np.full_like(one, np.nan) for one in found]


def smaller(call: int, found: list[np.ndarray]) -> list[np.ndarray]:
    return [one[:1] for one in found]


def fails(call: int, found: list[np.ndarray]) -> list[np.ndarray]:
    raise RuntimeError("first line\nInvalid shape")


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (late, "outputs differ"), (at_two, "outputs differ"), (nothing, "outputs differ by inf"),
        (smaller, r"scores is \(1, 2\), not \(2, 2\)"), (fails, "does not run: Invalid shape"),
    ],
)  # fmt: skip
def test_a_silent_fault_is_found(broken: Broken, complaint: str, tmp_path: Path) -> None:
    found = checked(toy_part(), tmp_path, broken)
    assert not found.passed
    assert re.search(complaint, "; ".join(found.problems)) and found.ran == (broken is not fails)


@pytest.mark.parametrize(
    ("static", "axes", "complaint"),
    [
        (False, {"pixels": [2, 3, 8, 8]}, "the axis 'batch' of pixels is fixed at 2"),
        (True, {}, "an axis of pixels is dynamic (batch)"),
        (False, {"pixels": ["batch", 3, 8, 9]}, "an axis of pixels has 9 elements, not 8"),
        (False, {"pixels": ["batch", 3, 8]}, "pixels has 3 axes, not 4"),
        (False, {"more": [1]}, "its inputs are pixels, prompts, more"),
    ],
)
def test_axes_are_read_back_from_the_file(static: bool, axes: dict, complaint: str, tmp_path: Path) -> None:
    part, path = toy_part(), tmp_path / "toy.json"
    target = eager_target(part.module)
    target.convert(part, path, static)
    path.write_text(json.dumps({**json.loads(path.read_text()), **axes}))
    found, _ = check(part, path, target, static, EXACT)
    assert not found.passed and complaint in found.problems[0] and found.comparisons == 0


def test_what_cannot_run_here_is_checked_by_its_structure_and_says_so(tmp_path: Path) -> None:
    part = toy_part()
    target = eager_target(part.module, fails)
    target.ran_here = False
    target.convert(part, tmp_path / "toy.json", False)
    found, _ = check(part, tmp_path / "toy.json", target, False, EXACT)
    assert found.passed and not found.ran and not found.milliseconds


def test_reduced_precision_is_judged_by_its_agreement(tmp_path: Path) -> None:
    part = toy_part()
    target = eager_target(part.module, lambda call, found: [found[0] * 1.001, found[1] * 1.001])
    target.convert(part, tmp_path / "toy.json", False)
    assert not check(part, tmp_path / "toy.json", target, False, EXACT)[0].passed
    assert check(part, tmp_path / "toy.json", target, False, Limits(None, 0.98))[0].passed


def squares(sizes: tuple[int, ...], flips: tuple[int, ...]) -> float:
    """Agreement of masks of so many pixels, each with so many pixels missing in the file. Both seeds are equal."""
    module = torch.nn.Identity()

    def example(case: dict[str, int], seed: int) -> tuple[torch.Tensor, ...]:
        whole = -torch.ones(1, 1, 30, 30)
        whole.view(-1)[: sizes[case["which"]]] = 1
        return (whole,)

    cases = tuple({"which": number} for number in range(len(sizes)))
    part = Part(
        "squares", module, (), ports(["masks"], 1, 1, 30, 30), example, {}, cases,
        lambda given: (given,), masks=("masks",),
    )  # fmt: skip

    def session(given: np.ndarray) -> list[np.ndarray]:
        found = given.copy()
        found.reshape(-1)[: flips[sizes.index(int((given > 0).sum()))]] = -1
        return [found]

    gate._compare_all(part, session, verdict := gate.Verdict())
    return verdict.agreement


def test_small_masks_are_compared_together_and_each_large_one_alone() -> None:
    assert squares((40, 60), (1, 0)) == pytest.approx(99 / 100)
    assert squares((40, 60), (40, 0)) == pytest.approx(60 / 100), "a case that is wrong still shows"
    assert squares((40, 800), (0, 80)) == pytest.approx(0.9)


def test_figures_by_hand() -> None:
    assert difference(np.array([1.0, 4.5]), np.array([1.0, 5.0])) == pytest.approx(0.1)
    assert difference(np.array([np.inf]), np.array([1.0])) == math.inf
    assert difference(np.zeros((1, 0)), np.zeros((1, 0))) == 0
    assert mask_iou(np.array([1, 1, -1, -1.0]), np.array([1, -1, 1, -1.0])) == pytest.approx(1 / 3)
    assert mask_iou(-np.ones(3), -np.ones(3)) == 1 and mask_iou(np.ones(3), -np.ones(3)) == 0
    assert cosine(np.array([1.0, 0]), np.array([1.0, 1])) == pytest.approx(math.sqrt(0.5))
    assert cosine(np.zeros(2), np.zeros(2)) == 1 and cosine(np.zeros(2), np.ones(2)) == 0


def test_latency_runs_the_smallest_case() -> None:
    part, shapes = toy_part(), set()
    latency(part, lambda *given: shapes.add(given[0].shape) or [])
    assert shapes == {example({"batch": 1, "prompts": 1}, 0)[0].shape}


def test_latency_is_the_median_over_alternating_rounds_with_the_spread_of_the_ratio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr(gate.time, "perf_counter", lambda: now[0])

    def run(name: str, seconds: float) -> list[np.ndarray]:
        calls.append(name)
        now[0] += seconds
        return []

    part, durations = toy_part(), iter([0.5, 0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.3])  # the first one is not counted
    part = replace(part, module=lambda *given: run("eager", 0.2))
    found = latency(part, lambda *given: run("file", next(durations)))
    assert calls == ["file", "eager"] * 8
    wanted = {"file": 200, "eager": 200, "ratio": 1, "least": 0.5, "greatest": 2}
    assert found == pytest.approx(wanted)
