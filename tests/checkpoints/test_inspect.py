"""Inspecting tells what a path is and whose trunk it has, with counts that the models confirm."""

import json

import pytest
import torch

from samdistill.checkpoints.inspect import inspect_path
from samdistill.checkpoints.merge import merge
from samdistill.store import FeatureStoreWriter, StoreSpec, make_codec
from samdistill.types import UserError


def elements(model) -> int:
    return sum(t.numel() for t in model.state_dict().values())


@pytest.mark.parametrize("name", ["sam3", "tracker"])
def test_a_teachers_folder(name, hosts):
    model, folder = hosts[name]
    found = inspect_path(folder)
    assert (found.kind, found.trunk) == ("model folder", "teacher")
    assert found.elements == elements(model) and found.bytes == 4 * found.elements
    assert found.dtypes == {"float32": found.elements}
    assert sum(group["elements"] for group in found.modules.values()) == found.elements
    assert found.facts["architectures"] == [type(model).__name__]
    if name == "sam3":
        vit = sum(p.numel() for p in model.vision_encoder.backbone.parameters())
        assert found.modules["vision_encoder.backbone"]["elements"] == vit


def test_a_students_folder_and_its_run(student):
    model, run = student
    found = inspect_path(run)
    assert found.kind == "run" and found.facts["finished"]
    (part,) = found.parts
    assert (part.kind, part.trunk, part.elements) == ("student folder", "student", elements(model))
    assert part.facts["backbone"] == "efficientvit_b0"
    assert json.loads(json.dumps(found.to_dict()))["parts"][0]["elements"] == part.elements


def test_merged_models_have_the_students_trunk_and_residue_shows(hosts, student, original, tmp_path):
    merge(student[1], hosts["tracker"][1], tmp_path / "folder")
    merge(student[1], original, tmp_path / "merged.pt")
    assert inspect_path(original).trunk == "teacher"
    assert inspect_path(tmp_path / "folder").trunk == "student"
    assert inspect_path(tmp_path / "merged.pt").trunk == "student"
    state = torch.load(tmp_path / "merged.pt", weights_only=True)["model"]
    state["detector.backbone.vision_backbone.trunk.blocks.0.norm1.weight"] = torch.ones(64)
    torch.save({"model": state}, tmp_path / "bad.pt")
    found = inspect_path(tmp_path / "bad.pt")
    assert found.trunk == "both" and "teacher residue" in str(found)


def test_a_training_checkpoint_counts_every_nested_tensor(tmp_path):
    content = {
        "model": {"w": torch.ones(3, 2)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(6, dtype=torch.float16)}}},
        "rng": [{"torch": torch.ones(5, dtype=torch.uint8)}], "step": 7,
    }  # fmt: skip
    torch.save(content, tmp_path / "ckpt_epoch_1.pt")
    found = inspect_path(tmp_path / "ckpt_epoch_1.pt")
    assert found.dtypes == {"float32": 6, "float16": 6, "uint8": 5}
    assert found.bytes == 24 + 12 + 5 and found.facts == {"step": 7} and found.trunk == "none"


def test_a_feature_store(tmp_path):
    spec = StoreSpec("image_embedding", (2, 3, 3), 42, "ab", "cd", "fp16")
    with FeatureStoreWriter(tmp_path, spec, make_codec("fp16", spec.shape)) as writer:
        for key in "abc":
            writer.write(key, 0, torch.zeros(2, 3, 3))
    found = inspect_path(tmp_path)
    assert found.kind == "feature store" and found.facts["records"] == 3
    assert found.facts["codec"] == "fp16" and found.facts["teacher"] == "ab"
    json.dumps(found.to_dict())


def test_what_is_nothing_of_these_is_one_clear_line(tmp_path):
    for absent in (tmp_path / "absent", "runs/absent"):  # the second could be a hub id
        with pytest.raises(UserError, match="no such file or folder"):
            inspect_path(absent)
    with pytest.raises(UserError, match="neither a model"):
        inspect_path(tmp_path)
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.md: not a weight file"):
        inspect_path(tmp_path / "notes.md")
