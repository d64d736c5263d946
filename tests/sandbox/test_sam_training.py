"""Training the sandbox's SAM and MobileSAM: a few steps, folders that open, and what is packaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import SamModel

import samdistill.sandbox as room
from samdistill.checkpoints.promptable import load_promptable
from samdistill.sandbox import training
from samdistill.sandbox.sam import build_mobile, build_sam
from samdistill.sandbox.sam_training import train_mobile, train_sam
from samdistill.sandbox.scenes import render_scenes
from samdistill.sandbox.teacher import HELD_OUT_SEED, IMAGE_SIZE, MULTIMASK, score
from samdistill.students.promptable import MobileSamModel
from samdistill.types import UserError

WEIGHTS = Path(room.__path__[0]) / "weights"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"EPOCH_STEPS": 2, "VALIDATION_SCENES": 4, "FINAL_SCENES": 4}.items():
        monkeypatch.setattr(training, name, value)


@pytest.mark.parametrize(("train", "kind"), [(train_sam, SamModel), (train_mobile, MobileSamModel)])
def test_it_writes_a_float16_folder_that_opens_and_its_figures(train, kind: type, tmp_path: Path) -> None:
    found = train(tmp_path, 2, 2, 1e-4, None)
    assert found.steps == 2
    assert set(found.figures) == {"box_miou", "point_miou", "refine_miou", "multimask_miou"}
    weights = load_file(found.folder / "model.safetensors")
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float16}
    model = load_promptable(found.folder)
    assert type(model) is kind and model.dtype == torch.float32
    miou = training.held_out_miou(model, 4)
    assert {f"{name}_miou": value for name, value in miou.items()} == pytest.approx(found.figures)


def test_a_trained_sam_can_be_trained_further(tmp_path: Path) -> None:
    found = train_sam(tmp_path, 2, 2, 2e-5, Path("sandbox-sam"))
    kept, moved = load_promptable("sandbox-sam").state_dict(), load_promptable(found.folder).state_dict()
    assert all(torch.allclose(moved[name], kept[name], atol=1e-3) for name in kept)
    assert any(not torch.equal(moved[name], kept[name]) for name in kept)


@pytest.mark.parametrize("weights", ["sandbox", "sandbox-mobile"])
def test_weights_of_another_kind_are_refused(weights: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{weights}: a .* trains a SamModel"):
        train_sam(tmp_path, 2, 2, 1e-4, Path(weights))


def test_a_mobile_starts_with_the_packaged_sam_s_prompt_half_and_its_own_trunk() -> None:
    model, sam = build_mobile(0), load_promptable("sandbox-sam").state_dict()
    own = model.state_dict()
    shared = [name for name in sam if not name.startswith("vision_encoder.")]
    assert shared and {name for name in own if not name.startswith("vision_encoder.")} == set(shared)
    assert all(torch.equal(own[name], sam[name]) for name in shared)
    other = build_mobile(1).state_dict()
    assert any(not torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize(("name", "most"), [("sam", 10e6), ("mobile", 4e6)])
def test_what_is_packaged_is_small(name: str, most: float) -> None:
    assert sum(path.stat().st_size for path in (WEIGHTS / name).iterdir()) < most


def test_the_packaged_sam_beats_the_packaged_mobile_which_beats_what_was_not_trained() -> None:
    scenes = render_scenes(range(12), IMAGE_SIZE, HELD_OUT_SEED)
    models = load_promptable("sandbox-sam"), load_promptable("sandbox-mobile"), build_sam(0)
    sam, mobile, fresh = (score(model, scenes) for model in models)
    for kind in ("box", "point", "refine", MULTIMASK):
        assert sam[kind].mean() > mobile[kind].mean() + 0.05
        assert mobile[kind].mean() > fresh[kind].mean()
