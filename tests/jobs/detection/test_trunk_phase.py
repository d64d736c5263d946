"""The term ``trunk``: a hosted trunk learns the output of the ViT in whose place it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_detection import DESCRIBED, PHASES, Recipe, small
from torch import Tensor, nn

from samdistill.config import FreezeConfig
from samdistill.engine.groups import frozen_until
from samdistill.engine.task import Phase
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.detection.scales import Scales
from samdistill.jobs.detection.task import DetectionBatch, DetectionTask
from samdistill.jobs.loading import load_config
from samdistill.types import UserError

TRUNK, ALL = Phase(0, "trunk", frozenset({"trunk"})), Phase(1, "features")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task(hosted: Recipe, tmp_path_factory: pytest.TempPathFactory) -> DetectionTask:
    return DetectionParts(hosted(tmp_path_factory.mktemp("base"))).task()


@pytest.fixture(scope="module")
def student(task: DetectionTask) -> nn.Module:
    torch.manual_seed(0)
    return task.build_student().eval()


def batch_of(task: DetectionTask, phase: Phase) -> DetectionBatch:
    data = task.dataset(phase.epoch)
    return task.to(task.collate([data[i] for i in range(3)], phase), CPU)


def outputs_of_trunks(task: DetectionTask, student: nn.Module, batch: DetectionBatch) -> tuple[Tensor, Tensor]:
    """What the modules in the place of the ViT return for the images, as transformers calls them."""
    pixels = batch.images.images.float() / 127.5 - 1
    with torch.no_grad():
        models = (student.model, task.teacher.model)
        found = [model.vision_encoder.backbone(pixels).last_hidden_state for model in models]
    return found[0], found[1]


def test_it_is_the_squared_error_of_the_two_trunks_alone_and_among_others(
    task: DetectionTask, student: nn.Module
) -> None:
    batch = batch_of(task, TRUNK)
    ours, theirs = outputs_of_trunks(task, student, batch)
    wanted = (ours - theirs).square().mean().item()
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for model in (student.model, task.teacher.model) for name, module in model.named_modules()
        if name in ("vision_encoder.neck", "text_encoder", "detr_encoder")
    ]  # fmt: skip
    alone = task.terms(student, batch, TRUNK)
    for hook in hooks:
        hook.remove()
    assert tuple(alone) == ("trunk",) and calls == []
    assert alone["trunk"].value.item() == pytest.approx(wanted, rel=1e-4)
    among = task.terms(student, batch_of(task, ALL), ALL)
    assert set(among) == set(task.config.loss.named) and "trunk" in among
    first = task.terms(student, batch_of(task, ALL), TRUNK)["trunk"].value.item()
    assert among["trunk"].value.item() == pytest.approx(first, rel=1e-4)


def test_in_units_of_channels_it_is_divided_by_their_variances(task: DetectionTask, student: nn.Module) -> None:
    batch = batch_of(task, TRUNK)
    answer = task.teacher.answer(batch.images, batch.prompts)
    ours, theirs = outputs_of_trunks(task, student, batch)
    deviation = theirs.double().flatten(0, 1).std(0, correction=0)
    scales = Scales.measure([answer])
    assert deviation.min() > 0.01 * deviation.mean() and scales.trunk is not None
    torch.testing.assert_close(scales.trunk[:, 0, 0].double(), deviation, rtol=1e-4, atol=1e-6)
    grids = [tokens.transpose(1, 2).unflatten(2, (9, 9)) for tokens in (ours, theirs)]
    (one,), (other,) = (scales.maps([grid], "trunk") for grid in grids)
    wanted = ((ours - theirs) / deviation).square().mean().item()
    assert (one - other).square().mean().item() == pytest.approx(wanted, rel=1e-4)


def test_an_unchanged_text_encoder_does_not_run_twice(
    hosted: Recipe, task: DetectionTask, student: nn.Module, tmp_path: Path
) -> None:
    def values(task: DetectionTask) -> tuple[dict[str, float], int]:
        ran: list[int] = []
        hook = student.model.text_encoder.register_forward_hook(lambda *_: ran.append(1))
        found = task.terms(student, batch_of(task, ALL), ALL)
        hook.remove()
        return {name: term.value.item() for name, term in found.items()}, len(ran)

    rules = [{"match": ["text_encoder.*"]}, {"match": ["text_projection.*"], "until": 1}]
    own = DetectionParts(hosted(tmp_path, f"train.freeze={json.dumps(rules)}")).task()
    assert task.kind.shares_text(0) and task.kind.shares_text(99)
    assert own.kind.shares_text(0) and not own.kind.shares_text(1)
    (shared, none), (apart, once) = values(task), values(own)
    assert (none, once) == (0, 1) and shared == pytest.approx(apart, rel=1e-4)
    assert not DetectionParts(hosted(tmp_path, "teacher.precision=bf16")).kind.shares_text(0)
    assert not DetectionParts(hosted(tmp_path, "student.host=sandbox", "teacher.path=sandbox")).kind.shares_text(0)


def test_a_parameter_is_frozen_until_the_last_rule_ends() -> None:
    rules = [FreezeConfig(match=["a.*"], until=2), FreezeConfig(match=["a.b"], until=5), FreezeConfig(match=["c"])]
    ends = [frozen_until(name, rules) for name in ("a.x", "a.b", "c", "d")]
    assert ends == [2, 5, float("inf"), 0]


def test_configs_that_ask_for_maps_they_cannot_have_are_refused(
    hosted: Recipe, detector: tuple[object, Path], scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"loss\.trunk: only a hosted student has a trunk in the place of its"):
        load_config("detection/sandbox", [*small(detector[1], scenes, tmp_path, DESCRIBED), "loss.trunk=1.0"])
    both = PHASES.replace("[{", "[{name: trunk, epochs: 1, lr: 1e-3, terms: [trunk]}, {", 1)
    with pytest.raises(UserError, match="phases of fpn alone and of trunk alone need different maps; give one kind"):
        hosted(tmp_path, both)
