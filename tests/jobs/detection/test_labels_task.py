"""Labels in the detection job: which signal runs in which phase, what trains, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_detection import OUTPUTS, TERMS, Recipe, small
from torch import nn
from transformers import Sam3Model

from samdistill.cli import main
from samdistill.engine import Checkpoint, fit
from samdistill.engine.task import Phase
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.label_terms import LABEL_TERMS
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.detection.plan import plan_detection
from samdistill.jobs.detection.task import DetectionBatch, DetectionTask
from samdistill.jobs.loading import load_config
from samdistill.teachers import Sam3Detector
from samdistill.types import UserError

LABELS = tuple(LABEL_TERMS.published)
WEIGHTS = tuple(f"loss.{name}={weight}" for name, weight in LABEL_TERMS.published.items())
ALONE = f"train.phases=[{{name: labels, epochs: 1, lr: 1e-3, terms: [{', '.join(LABELS)}]}}]"
BOTH = "train.phases=[{name: both, epochs: 1, lr: 1e-3}]"
TWO = (f"train.phases=[{{name: teacher, epochs: 1, lr: 1e-3, terms: [{', '.join(OUTPUTS)}]}}, "
       f"{{name: labels, epochs: 1, lr: 1e-3, terms: [{', '.join(LABELS)}]}}]")  # fmt: skip
TRUNK = "vision_encoder.backbone."


class Silent(Sam3Detector):
    """A teacher that must not be asked. Its weights, sizes and tokenizer are those of a loaded one."""

    def __init__(self, loaded: Sam3Detector) -> None:
        vars(self).update(vars(loaded))

    def answer(self, *asked: Any) -> Any:
        raise AssertionError("the teacher ran")

    text = features = trunk = pyramid = answer  # type: ignore[assignment]


@pytest.fixture(scope="module")
def teacher(hosted: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Sam3Detector:
    return DetectionParts(hosted(tmp_path_factory.mktemp("teacher"))).teacher


@pytest.fixture
def variant(hosted: Recipe, teacher: Sam3Detector, tmp_path: Path):
    """variant(*overrides, runs=True): a hosted student's task with the published weights of labels."""

    def make(*overrides: str, runs: bool = True) -> DetectionTask:
        parts = DetectionParts(hosted(tmp_path / "run", *WEIGHTS, BOTH, *overrides))
        vars(parts)["teacher"] = teacher if runs else Silent(teacher)
        return parts.task()

    return make


def batch_of(task: DetectionTask, phase: Phase, count: int = 4) -> DetectionBatch:
    data = task.dataset(phase.epoch)
    return task.to(task.collate([data[i] for i in range(count)], phase), torch.device("cpu"))


def student_of(task: DetectionTask) -> nn.Module:
    torch.manual_seed(0)
    return task.build_student().train()


def test_with_labels_alone_the_teacher_does_not_run(variant) -> None:
    task = variant(ALONE, runs=False)
    phase = Phase.of(task.config.train, 0)
    terms = task.terms(student_of(task), batch_of(task, phase), phase)
    assert tuple(sorted(terms)) == tuple(sorted(LABELS))
    assert {name: term.weight for name, term in terms.items()} == LABEL_TERMS.published
    assert not terms.nonfinite() and min(term.value.item() for term in terms.values()) > 0
    held_out = task.validate(student_of(task).eval(), phase)
    assert set(held_out) == {*LABELS, "total"}
    beside = variant(runs=False)  # it is asked where a term of its own is trained
    phase = Phase.of(beside.config.train, 0)
    with pytest.raises(AssertionError, match="the teacher ran"):
        beside.terms(student_of(beside), batch_of(beside, phase), phase)


def test_a_phase_reads_only_the_labels_that_it_trains(variant) -> None:
    task = variant(TWO)
    first, second = (Phase.of(task.config.train, epoch) for epoch in (0, 1))
    asked = task.dataset(0)[0][1]
    assert all(question.labels is None for question in asked)
    batch = batch_of(task, first)
    assert batch.labels is None and set(task.terms(student_of(task), batch, first)) == set(OUTPUTS)
    batch = batch_of(task, second)
    assert batch.labels is not None and batch.labels.masks.dtype == torch.uint8
    assert batch.labels.masks.shape[-1] == max(task.teacher.info.levels) == task.label_side
    assert set(task.terms(student_of(task), batch, second)) == set(LABELS)


def test_both_signals_are_the_terms_of_each(variant) -> None:
    task, alone = variant("questions.boxes=0.5"), variant(ALONE, "questions.boxes=0.5")
    phase, other = Phase.of(task.config.train, 0), Phase.of(alone.config.train, 0)
    student, batch = student_of(task).eval(), batch_of(task, phase)
    terms = task.terms(student, batch, phase)
    assert set(terms) == {*TERMS, "trunk", *LABELS}
    assert batch.labels is not None and not batch.labels.known.all()  # a box of an object with several names
    labelled = alone.terms(student, batch_of(alone, other), other)
    for name in LABELS:
        assert terms[name].value.item() == pytest.approx(labelled[name].value.item(), rel=1e-4), name
    counts = task.counts(batch)
    known, shown = int(batch.labels.known.sum()), int(batch.labels.valid.any(1).sum())
    assert 0 < shown < known < len(batch.prompts) == counts["mask"]
    assert (counts["label_presence"], counts["label_dice"], counts["label_score"]) == (known, shown, shown)


def test_weights_of_0_turn_labels_off(hosted: Recipe, tmp_path: Path) -> None:
    off = [f"loss.{name}=0" for name in LABELS]
    config = hosted(tmp_path, *off, "questions={source: generic, negatives: 0}")
    assert config.label_names == () and DetectionParts(config).label_side is None


@pytest.mark.parametrize("name", LABELS)
def test_each_term_falls_on_a_repeated_batch(variant, name: str) -> None:
    task = variant(ALONE.replace(", ".join(LABELS), name), "train.freeze=[]", "match.mask=0", "match.logit=0")
    phase = Phase.of(task.config.train, 0)
    student, batch = student_of(task), batch_of(task, phase, 2)
    adam = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], 2e-3)
    values = []
    for _ in range(8):
        adam.zero_grad()
        term = task.terms(student, batch, phase).only([name])
        term.total.backward()
        adam.step()
        values.append(term[name].value.item())
    assert values[-1] < 0.8 * values[0], values


def test_a_run_moves_the_parameters_that_are_not_frozen_and_nothing_else(variant, tmp_path: Path) -> None:
    task = variant(ALONE, runs=False)
    torch.manual_seed(task.config.train.seed)
    student = task.build_student()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    result = fit(task, task.config.train, tmp_path / "run", workers=0)
    assert result.steps == 4 and set(result.terms) == set(LABELS)
    after = Sam3Model.from_pretrained(result.student).state_dict()
    statistics = {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    changed = {name for name in before if not torch.equal(before[name], after[name])} - statistics
    assert changed == {name for name, _ in student.named_parameters() if name.startswith(TRUNK)}


def test_a_run_on_two_signals_is_resumed_and_refuses_other_annotations(
    hosted: Recipe, teacher: Sam3Detector, scenes: Path, tmp_path: Path
) -> None:
    root = tmp_path / "scenes"
    shutil.copytree(scenes, root)
    phases = TWO.replace("name: labels, epochs: 1", "name: labels, epochs: 2")

    def task_of() -> DetectionTask:
        parts = DetectionParts(hosted(tmp_path / "run", *WEIGHTS, phases, f"data.root={root}", "train.batch_size=8"))
        vars(parts)["teacher"] = teacher
        return parts.task()

    task = task_of()
    fit(task, task.config.train, tmp_path / "whole", workers=0)
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt_epoch_2.pt", tmp_path / "part")
    fit(task, task.config.train, tmp_path / "part", workers=0)
    one, other = (Checkpoint.load(tmp_path / name / "ckpt_epoch_3.pt") for name in ("whole", "part"))
    assert one.terms == other.terms and set(one.terms) == set(LABELS)
    assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt_epoch_2.pt", tmp_path / "moved")
    path = root / "annotations" / "instances_train.json"
    record = json.loads(path.read_text())
    record["annotations"][0]["segmentation"], record["annotations"][0]["bbox"] = [[1, 1, 9, 1, 9, 9]], [1, 1, 8, 8]
    path.write_text(json.dumps(record))
    changed = task_of()
    with pytest.raises(UserError, match="data"):
        fit(changed, changed.config.train, tmp_path / "moved", workers=0)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [(("questions={source: generic, negatives: 0}",), r"loss\.label_box_l1: phrases of questions\.source=generic"),
     (("questions={source: jsonl, file: x.jsonl}",), r"phrases of questions\.source=jsonl have no labels"),
     ((ALONE, "loss.label_giou=0"), "phase 'labels': label_giou has no weight"),
     (("loss.label_masks=1",), "label_masks")],
)  # fmt: skip
def test_settings_without_labels_are_refused(
    hosted: Recipe, tmp_path: Path, overrides: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        hosted(tmp_path, *WEIGHTS, *overrides)


def renamed(scenes: Path, root: Path) -> Path:
    """The scenes with ids in the place of names."""
    shutil.copytree(scenes, root)
    for path in (root / "annotations").iterdir():
        record = json.loads(path.read_text())
        for annotation in record["annotations"]:
            del annotation["concepts"]
        for category in record["categories"]:
            category["name"] = f"cat_{category['id']}"
        path.write_text(json.dumps(record))
    return root


@pytest.mark.parametrize("verb", ["plan", "check", "train"])
def test_names_that_are_no_phrases_end_in_one_line(
    hosted: Recipe, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    config = hosted(tmp_path / "run", *WEIGHTS, BOTH, f"data.root={renamed(scenes, tmp_path / 'scenes')}")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main([verb, str(tmp_path / "run.yaml")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "label_" in line]
    assert len(lines) == 1 and "120 of 120 categories are no phrases: 'cat 1', 'cat 10'" in lines[0]


def test_images_without_names_are_refused(hosted: Recipe, world: Path, tmp_path: Path) -> None:
    config = hosted(tmp_path / "run", *WEIGHTS, "data.kind=sa1b", f"data.root={world}")
    for refused in (plan_detection, lambda own: DetectionParts(own).task()):
        with pytest.raises(UserError, match=r"loss\.label_box_l1: the data set has masks, but no names"):
            refused(config)


def test_the_recipe_has_both_signals_with_a_tenth_of_the_published_weights(
    detector, scenes: Path, tmp_path: Path
) -> None:
    config = load_config("detection/hosted_labels_sandbox")
    assert isinstance(config, DetectionRunConfig)
    tenth = {name: pytest.approx(weight / 10) for name, weight in LABEL_TERMS.published.items()}
    assert {name: config.loss.weight(name) for name in config.label_names} == tenth
    assert config.wanted(0) == {*TERMS, *LABELS} and config.questions.source == "names"
    base = load_config("detection/hosted_joint_sandbox").model_dump()
    changed = {key for key, value in config.model_dump().items() if value != base[key]}
    assert changed == {"output", "loss"}
    own = load_config("detection/hosted_labels_sandbox", [
        *small(detector[1], scenes, tmp_path, ()), "student.text_encoder=null", "student.start=null", "train.rates=[]",
    ])  # fmt: skip
    assert plan_detection(own).facts()["labels"].startswith("label_box_l1, label_dice")
