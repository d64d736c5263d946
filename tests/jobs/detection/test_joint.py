"""Joint fine-tuning: trunk and small text encoder train together, all other tensors of the host stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_detection import BATCHES, TERMS, Recipe, measured, small
from torch import Tensor
from transformers import Sam3LiteTextModel

import samdistill as sd
from samdistill.cli import main
from samdistill.engine.groups import Freezing
from samdistill.engine.task import Phase
from samdistill.inference.concepts import load_concept_model
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.detection.plan import plan_detection
from samdistill.jobs.loading import load_config
from samdistill.pipeline import train
from samdistill.students import StudentTrunkConfig, build_trunk
from samdistill.types import UserError

TRUNK, TEXT = "vision_encoder.backbone.", ("text_encoder.", "text_projection.")
CPU = torch.device("cpu")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
UNREAD = "text_encoder.projection.weight"
"""Not frozen, but part of the pooled output alone, which the heads do not read."""
RATE = 2.5e-5
"""The published rate of the trunk. That of the text encoder is 5e-6."""


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished encoder run whose batch norms have statistics."""
    torch.manual_seed(5)
    found = build_trunk(
        StudentTrunkConfig(backbone="es_ev_s", head="strided", hidden_size=64, patch_size=14, image_size=126)
    )
    folder = tmp_path_factory.mktemp("trunk")
    measured(found).save_pretrained(folder / "student")
    return folder


@pytest.fixture(scope="module")
def joint(detector, words_run: Path, trunk: Path, scenes: Path) -> Recipe:
    """joint(output, *overrides): ``detection/hosted_joint`` with the tiny models, on the scenes, in one step."""

    def make(output: Path, *overrides: str) -> DetectionRunConfig:
        sizes = (
            f"student.text_encoder={words_run}",
            f"student.trunk={trunk}",
            "student.start=null",
            "student.head=strided",
            "questions.file=null",
        )
        once = f"train.phases=[{{name: joint, epochs: 1, lr: {RATE}, terms: [{', '.join(TERMS)}]}}]"
        config = load_config(
            "detection/hosted_joint",
            [*small(detector[1], scenes, output, sizes), "train.batch_size=16", once, *overrides],
        )
        assert isinstance(config, DetectionRunConfig)
        return config

    return make


def trains(name: str) -> bool:
    return name.startswith((TRUNK, *TEXT)) and not name.endswith(STATISTICS) and name != UNREAD


@pytest.fixture(scope="module")
def trained(
    joint: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DetectionRunConfig, dict[str, Tensor], Sam3LiteTextModel]:
    """The configuration of a run of one step, its student's tensors before it, and the finished model."""
    config = joint(tmp_path_factory.mktemp("joint"))
    before = DetectionParts(config).task().build_student().state_dict()
    train(config)
    return config, before, Sam3LiteTextModel.from_pretrained(config.output / "student")


def test_a_step_has_a_gradient_at_trunk_and_text_encoder_and_at_nothing_else(joint: Recipe, tmp_path: Path) -> None:
    config = joint(tmp_path)
    task = DetectionParts(config).task()
    student = task.build_student().train()
    Freezing(student, config.train.freeze, 1, True).start(0)
    data, phase = task.dataset(0), Phase.of(config.train, 0)
    batch = task.to(task.collate([data[i] for i in range(4)], phase), CPU)
    terms = task.terms(student, batch, phase).only(phase.only)
    terms.total.backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {name for name, _ in student.named_parameters() if trains(name)}
    assert set(terms) == set(TERMS) and {name.partition(".")[0] for name in reached} >= {"vision_encoder", TEXT[0][:-1]}


def test_only_they_change_and_not_their_batch_norms_statistics(trained, lite: Path, trunk: Path) -> None:
    _, before, model = trained
    after, host = model.state_dict(), Sam3LiteTextModel.from_pretrained(lite).state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if trains(name)}
    kept = [name for name in after if not name.startswith((TRUNK, *TEXT))]
    assert kept and all(torch.equal(after[name], host[name]) for name in kept)
    counts = [after[name] for name in after if name.endswith("num_batches_tracked")]
    assert counts and all(count == BATCHES for count in counts)


def test_each_part_moves_at_its_published_rate(trained) -> None:
    """The first step of Adam moves a weight by its learning rate, whatever the size of its gradient."""
    _, before, model = trained
    after = model.state_dict()

    def moved(begin: str | tuple[str, ...]) -> float:
        steps = (after[name] - before[name] for name in before if trains(name) and name.startswith(begin))
        return max(step.abs().max().item() for step in steps)

    assert moved(TRUNK) == pytest.approx(2.5e-5, rel=0.03)
    assert moved(TEXT) == pytest.approx(5e-6, rel=0.03)


def test_check_and_plan_know_what_trains(trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _, model = trained
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main(["check", str(tmp_path / "run.yaml"), "train.batch_size=2"]) == 0, capsys.readouterr()
    found = plan_detection(config)
    counted = (p.numel() for name, p in model.named_parameters() if trains(name) or name == UNREAD)
    assert found.trained_params == sum(counted)
    assert found.student_params == sum(p.numel() for p in model.parameters())


def test_the_folder_answers_to_words(trained, scenes: Path) -> None:
    config, _, _ = trained
    assert isinstance(load_concept_model(config.output).model, Sam3LiteTextModel)
    image = sorted(scenes.rglob("*.jpg"))[0]
    red, star = (sd.load(config.output)(image, text=text, threshold=0.0) for text in ("red circle", "star"))
    assert len(red) and not torch.equal(red.scores, star.scores)


def test_a_text_encoder_that_does_not_train_is_named(joint: Recipe, tmp_path: Path) -> None:
    config = joint(tmp_path / "run", "train.freeze=[{match: [text_encoder.*, text_projection.*]}]")
    with pytest.raises(UserError, match=r"train\.rates: 'text_encoder.*frozen for the whole run") as refused:
        train(config)
    assert "\n" not in str(refused.value)
