"""Training tracker, SAM and MobileSAM: a few steps, folders that open, and a resume that changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import prompt_training
from prompt_training import MOBILE, SAM, TRACKER, Recipe, SceneNumbers, TeacherTask, TrainedTeacher, train_promptable
from sam_models import build_mobile, build_sam
from samdistill.checkpoints.files import locate
from samdistill.checkpoints.promptable import load_promptable
from samdistill.sandbox.scenes import render_scenes
from samdistill.types import UserError
from tracker_model import HELD_OUT_SEED, IMAGE_SIZE, MULTIMASK, score

SHORT = {"EPOCH_STEPS": 1, "WARM_UP_STEPS": 1, "VALIDATION_SCENES": 4, "FINAL_SCENES": 4}
KINDS = {"box_miou", "point_miou", "refine_miou"}


@pytest.fixture(autouse=True, scope="module")
def short():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setattr(prompt_training, name, value)
        yield


@pytest.fixture(scope="module")
def trained(short, tmp_path_factory: pytest.TempPathFactory) -> TrainedTeacher:
    return train_promptable(TRACKER, tmp_path_factory.mktemp("teacher"), 2, 2, 1e-3, None)


def assert_as_figured(found: TrainedTeacher, recipe: Recipe) -> None:
    weights = load_file(found.folder / "model.safetensors")
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float16}
    model = load_promptable(found.folder)
    assert type(model) is recipe.kind and model.dtype == torch.float32
    miou = prompt_training.held_out_miou(model, 4)
    assert {f"{kind}_miou": value for kind, value in miou.items()} == pytest.approx(found.figures)


def test_it_writes_a_float16_folder_that_opens_and_its_figures(trained: TrainedTeacher, tmp_path: Path) -> None:
    assert trained.steps == 2 and set(trained.figures) == KINDS
    assert_as_figured(trained, TRACKER)
    mobile = train_promptable(MOBILE, tmp_path, 1, 2, 1e-4, None)
    assert set(mobile.figures) == KINDS | {"multimask_miou"}
    assert_as_figured(mobile, MOBILE)


def test_resumed_in_the_middle_it_ends_in_the_same_weights_and_other_settings_are_refused(
    trained: TrainedTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, steps = prompt_training.render_scenes, []

    def dies(*args: object, **options: object) -> object:
        steps.append(args)
        if len(steps) == 3:  # a step, the validation's batch, then in the second epoch
            raise KeyboardInterrupt
        return render(*args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prompt_training, "render_scenes", dies)
        train_promptable(TRACKER, tmp_path, 2, 2, 1e-3, None)
    assert (tmp_path / "ckpt_epoch_1.pt").exists() and not (tmp_path / "weights").exists()
    train_promptable(TRACKER, tmp_path, 2, 2, 1e-3, None)
    first, second = (load_file(folder / "model.safetensors") for folder in (trained.folder, tmp_path / "weights"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UserError, match=r"was trained with other settings: train\.lr"):
        train_promptable(TRACKER, tmp_path, 2, 2, 2e-3, None)


def test_a_trained_one_can_be_trained_further(tmp_path: Path) -> None:
    found = train_promptable(SAM, tmp_path, 1, 2, 2e-5, Path("sandbox-sam"))  # a rate at which the start is still seen
    assert_as_figured(found, SAM)
    kept, moved = load_promptable("sandbox-sam").state_dict(), load_promptable(found.folder).state_dict()
    assert all(torch.allclose(moved[name], kept[name], atol=1e-3) for name in kept)
    assert any(not torch.equal(moved[name], kept[name]) for name in kept)


@pytest.mark.parametrize("weights", ["sandbox", "sandbox-mobile"])
def test_weights_of_another_kind_are_refused(weights: str) -> None:
    with pytest.raises(UserError, match=f"{weights}: a .*, but sam is a SamModel"):
        TeacherTask(2, Path(weights), SAM).build_student()


def test_no_scene_is_seen_twice_and_prompts_follow_from_the_scenes() -> None:
    numbers = [SceneNumbers(4, epoch)[i] for epoch in range(3) for i in range(4)]
    assert numbers == list(range(12))
    task, device = TeacherTask(2, Path("sandbox")), torch.device("cpu")
    model = task.build_student()
    assert model.training
    values = [task.terms(model, task.to(batch, device)).total.item() for batch in ([0, 1], [0, 1], [2, 3])]
    assert values[0] == values[1] != values[2]


def test_a_mobile_starts_with_the_packaged_sam_s_prompt_half_and_its_own_trunk() -> None:
    model, sam = build_mobile(0), load_promptable("sandbox-sam").state_dict()
    own = model.state_dict()
    shared = [name for name in sam if not name.startswith("vision_encoder.")]
    assert shared and {name for name in own if not name.startswith("vision_encoder.")} == set(shared)
    assert all(torch.equal(own[name], sam[name]) for name in shared)
    other = build_mobile(1).state_dict()
    assert any(not torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize(("name", "most"), [("sandbox", 10e6), ("sandbox-sam", 10e6), ("sandbox-mobile", 4e6)])
def test_what_is_packaged_is_small(name: str, most: float) -> None:
    assert sum(path.stat().st_size for path in locate(name).iterdir()) < most


def test_the_packaged_sam_beats_the_packaged_mobile_which_beats_what_was_not_trained() -> None:
    scenes = render_scenes(range(12), IMAGE_SIZE, HELD_OUT_SEED)
    models = load_promptable("sandbox-sam"), load_promptable("sandbox-mobile"), build_sam(0)
    sam, mobile, fresh = (score(model, scenes) for model in models)
    for kind in ("box", "point", "refine", MULTIMASK):
        assert sam[kind].mean() > mobile[kind].mean() + 0.05
        assert mobile[kind].mean() > fresh[kind].mean()
