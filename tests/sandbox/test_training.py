"""Training the sandbox's teacher: a few steps, a folder that opens, and a resume that changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from samdistill.checkpoints.promptable import load_promptable
from samdistill.sandbox import training
from samdistill.sandbox.training import SceneNumbers, TeacherTask, TrainedTeacher, train_tracker
from samdistill.types import UserError


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"EPOCH_STEPS": 2, "WARM_UP_STEPS": 2, "VALIDATION_SCENES": 4, "FINAL_SCENES": 4}.items():
        monkeypatch.setattr(training, name, value)


def train(out: Path, weights: Path | None = None, lr: float = 1e-3) -> TrainedTeacher:
    return train_tracker(out, 4, 2, lr, weights)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedTeacher:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"EPOCH_STEPS": 2, "WARM_UP_STEPS": 2, "VALIDATION_SCENES": 4, "FINAL_SCENES": 4}.items():
            patch.setattr(training, name, value)
        return train(tmp_path_factory.mktemp("teacher"))


def test_it_writes_a_float16_folder_that_opens_and_its_figures(trained: TrainedTeacher) -> None:
    assert trained.steps == 4 and set(trained.figures) == {"box_miou", "point_miou", "refine_miou"}
    assert all(0 <= value <= 1 for value in trained.figures.values())
    weights = load_file(trained.folder / "model.safetensors")
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float16}
    model = load_promptable(trained.folder)
    miou = training.held_out_miou(model, 4)
    assert model.dtype == torch.float32
    assert {f"{kind}_miou": value for kind, value in miou.items()} == pytest.approx(trained.figures)


def test_resumed_in_the_middle_it_ends_in_the_same_weights(
    trained: TrainedTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, steps = training.render_scenes, []

    def dies(*args: object, **options: object) -> object:
        steps.append(args)
        if len(steps) == 5:  # two steps, the validation's batch, then in the second epoch
            raise KeyboardInterrupt
        return render(*args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "render_scenes", dies)
        train(tmp_path)
    assert (tmp_path / "ckpt_epoch_1.pt").exists() and not (tmp_path / "weights").exists()
    train(tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in (trained.folder, tmp_path / "weights"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_can_start_from_an_earlier_teacher(trained: TrainedTeacher, tmp_path: Path) -> None:
    task = TeacherTask(2, trained.folder)
    student = task.build_student()
    assert student.training
    kept, state = load_promptable(trained.folder).state_dict(), student.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    result = train(tmp_path, weights=trained.folder, lr=2e-5)  # so small that what it started from is still seen
    moved = load_promptable(result.folder).state_dict()
    assert all(torch.allclose(moved[name], kept[name], atol=1e-3) for name in kept)
    assert any(not torch.equal(moved[name], kept[name]) for name in kept)


def test_another_run_into_the_same_folder_is_refused(trained: TrainedTeacher) -> None:
    with pytest.raises(UserError, match=r"was trained with other settings: train\.lr"):
        train(trained.folder.parent, lr=2e-3)


def test_no_scene_is_seen_twice_and_prompts_follow_from_the_scenes() -> None:
    numbers = [SceneNumbers(4, epoch)[i] for epoch in range(3) for i in range(4)]
    assert numbers == list(range(12))
    task, device = TeacherTask(2), torch.device("cpu")
    model = task.build_student()
    values = [task.terms(model, task.to(batch, device)).total.item() for batch in ([0, 1], [0, 1], [2, 3])]
    assert values[0] == values[1] != values[2]
