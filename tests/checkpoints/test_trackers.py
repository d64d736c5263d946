"""SAM 3's tracker with its memory: what a merge keeps, and which classes open the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from original_names import as_original
from safetensors.torch import load_file
from small_students import make_student
from transformers import (
    AutoProcessor,
    Sam3TrackerModel,
    Sam3TrackerVideoModel,
    Sam3TrackerVideoProcessor,
    Sam3VideoModel,
)

import samdistill as sd
from samdistill.checkpoints.merge import merge
from samdistill.checkpoints.promptable import load_promptable
from samdistill.checkpoints.trackers import load_tracker, load_worded, tracker_class
from samdistill.inference.tracker import TrackerSession
from samdistill.ops.images import IMAGENET_MEAN, IMAGENET_STD
from samdistill.students import StudentTrunk
from samdistill.types import UserError

TRUNKS = {"memory": "tracker_model.detector_model.vision_encoder.backbone.",
          "video": "detector_model.vision_encoder.backbone."}  # fmt: skip


@pytest.fixture(scope="module")
def merged(hosts, student, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("merged")
    for name in TRUNKS:
        merge(student[1], hosts[name][1], root / name)
    return {name: root / name for name in TRUNKS}


@pytest.mark.parametrize("name", list(TRUNKS))
def test_everything_but_the_trunk_is_kept(name: str, hosts, student, merged: dict[str, Path]) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (hosts[name][1], merged[name]))
    kept = {tensor for tensor in before if not tensor.startswith(TRUNKS[name])}
    assert any("memory_attention." in tensor for tensor in kept) and any("memory_encoder." in tensor for tensor in kept)
    assert all(torch.equal(after[tensor], before[tensor]) for tensor in kept)
    assert set(after) == kept | {TRUNKS[name] + tensor for tensor in student[0].state_dict()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("memory", Sam3TrackerVideoModel), ("video", Sam3TrackerVideoModel), ("video", Sam3VideoModel)],
)
def test_the_classes_with_a_memory_open_the_folder(name: str, kind, hosts, merged: dict[str, Path]) -> None:
    model, found = kind.from_pretrained(merged[name], output_loading_info=True)
    assert not any(found.values())
    tracker = getattr(model, "tracker_model", model)
    trunk = getattr(model, "detector_model", model).vision_encoder.backbone
    assert type(trunk) is StudentTrunk and tracker.image_size == trunk.config.image_size == 126
    ours = load_tracker(merged[name])
    assert type(ours) is tracker_class(merged[name]) is Sam3TrackerVideoModel
    for key, value in tracker.memory_attention.state_dict().items():
        torch.testing.assert_close(ours.memory_attention.state_dict()[key], value, rtol=0, atol=0)


def test_the_tracker_of_videos_predicts_on_images_too(merged: dict[str, Path]) -> None:
    assert type(load_promptable(merged["memory"])) is Sam3TrackerModel
    model = sd.load(merged["memory"], device="cpu")
    assert model.kind == "promptable"
    assert model(np.zeros((60, 80, 3), np.uint8), boxes=[(5, 5, 40, 40)]).masks.shape == (1, 60, 80)
    processor = AutoProcessor.from_pretrained(merged["memory"])
    assert type(processor) is Sam3TrackerVideoProcessor and processor.video_processor.size.height == 126


@pytest.mark.parametrize("name", list(TRUNKS))
def test_a_student_of_another_size_tracks(name: str, hosts, tmp_path: Path) -> None:
    """168 px: 12 x 12 cells, which the memory's positions have to follow."""
    make_student(image_size=168).save_pretrained(tmp_path / "student")
    merge(tmp_path / "student", hosts[name][1], tmp_path / "merged")
    model = load_tracker(tmp_path / "merged")
    assert model.image_size == 168 and model.config.memory_attention_rope_feat_sizes == [12, 12]
    session, mask = TrackerSession(model), np.zeros((50, 70), bool)
    mask[10:30, 10:40] = True
    session.add_mask(mask)
    for number in range(3):
        (found,) = session.push(np.full((50, 70, 3), 20 * number, np.uint8))
        assert found.mask.shape == (50, 70)
    assert session.memory_bytes > 3 * 12 * 12 * 64 * 2


def test_an_original_file_tracks(hosts, tmp_path: Path) -> None:
    """It has no sizes, so those of a ``config.json`` beside it count, as for every other part."""
    model, folder = hosts["memory"]
    torch.save({"model": as_original(model.state_dict())}, tmp_path / "sam3.pt")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert tracker_class(tmp_path / "sam3.pt") is Sam3TrackerVideoModel
    ours = load_tracker(tmp_path / "sam3.pt")
    memory = {key: value for key, value in model.state_dict().items() if key.startswith("memory_")}
    for key, value in memory.items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=0, atol=0)
    session = sd.load(tmp_path / "sam3.pt", device="cpu").session()
    session.add_box((5, 5, 40, 40))
    assert session.push(np.zeros((60, 80, 3), np.uint8))[0].mask.shape == (60, 80)


def test_what_does_not_fit_is_refused_in_one_line(hosts, student, merged: dict[str, Path], tmp_path: Path) -> None:
    make_student(hidden_size=32).save_pretrained(tmp_path / "narrow")
    make_student(fine_channels=(4, 8)).save_pretrained(tmp_path / "fine")
    make_student(host_mean=IMAGENET_MEAN, host_std=IMAGENET_STD).save_pretrained(tmp_path / "sam2")
    for source, complaint in (
        ("narrow", "the student gives 32 channels"),
        ("fine", r"a trunk for another host: fine levels .*: \[4, 8\], but"),
        ("sam2", r"a trunk for another host: mean of its images: \[0.485"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=complaint) as refused:
            merge(tmp_path / source, hosts["memory"][1], tmp_path / "out")
        assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no memory of a SAM 2 or a SAM 3 in it, so it cannot track"):
        load_tracker(hosts["tracker"][1])
    with pytest.raises(UserError, match="a Sam3TrackerVideoModel takes no words in a video"):
        load_worded(merged["memory"])
    with pytest.raises(UserError, match="no detector"):
        sd.predict(np.zeros((60, 80, 3), np.uint8), merged["memory"], text="dog")
