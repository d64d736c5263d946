"""The whole road with a SAM or SAM 2 as teacher: kind and geometry are found, and all levels are learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_sams import sam2_settings
from torch.nn import functional as F
from transformers import Sam2Config, Sam2Model, SamConfig, SamModel

from samdistill.checkpoints.merge import merge
from samdistill.checkpoints.processors import inputs_of
from samdistill.checkpoints.promptable import load_promptable
from samdistill.config import TeacherConfig
from samdistill.inference.geometry import own_geometry
from samdistill.jobs.encoder.evaluate import merge_student
from samdistill.jobs.encoder.parts import EncoderParts
from samdistill.jobs.loading import load_config
from samdistill.ops.promptable import sam_pixels
from samdistill.pipeline import distill
from samdistill.teachers import TEACHERS, build_teacher, describe_teacher, teacher_kind
from samdistill.types import ImageBatch, UserError


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> Path:
    vision = {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
        "patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": 8,
    }  # fmt: skip
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 16}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    made = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=made) * 0.2
    folder = tmp_path_factory.mktemp("sam")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sam2(tmp_path_factory) -> Path:
    model = Sam2Model(Sam2Config(**sam2_settings(32)))
    made = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=made) * 0.1
    folder = tmp_path_factory.mktemp("sam2")
    model.save_pretrained(folder)
    return folder


def test_a_sam2_goes_the_whole_road_and_all_levels_approach(sam2: Path, world: Path, tmp_path: Path) -> None:
    settings = ["data.workers=0", "evaluate.prompts=[box]", "evaluate.images=4", "train.warmup_epochs=0.2",
                "train.lr=0.01", "train.lr_batch=null"]  # fmt: skip
    result = distill("encoder", world, teacher=str(sam2), student="es_ev_s", out=tmp_path / "run",
                     train={"epochs": 3}, overrides=settings)  # fmt: skip
    assert (result.config.teacher.kind, result.config.data.geometry) == ("sam2", "square")
    stores = {path.name for path in result.config.store_root.iterdir() if path.is_dir()}
    assert stores == {"high_resolution_0", "high_resolution_1", "image_embedding"}
    cached = sum(path.stat().st_size for path in result.config.store_root.rglob("*-values.bin"))
    assert cached == result.planned.cache_bytes == 24 * result.planned.bytes_per_record
    model = load_promptable(tmp_path / "run")
    trained = torch.load(result.trained.checkpoint, weights_only=True)["model"]
    state = model.vision_encoder.backbone.state_dict()
    assert set(state) == set(trained) and all(torch.equal(state[name], trained[name]) for name in trained)

    parts = EncoderParts(result.config)
    task = parts.task(parts.signals(proven=False))
    batch = task.to(task.collate([task.dataset(0)[index] for index in range(8)]), torch.device("cpu"))
    pixels = task.teacher.pixels(batch.images)
    torch.manual_seed(result.config.train.seed)
    with torch.no_grad():  # with the statistics of the batch, because those of a short training lag behind
        before = task.build_student().train().image_levels(pixels)
        after = model.vision_encoder.backbone.train().image_levels(pixels)
    for level, own, start in zip(batch.teacher_features, after, before, strict=True):
        assert F.mse_loss(own, level) < F.mse_loss(start, level)


def test_a_term_is_the_mean_over_the_levels_and_each_reaches_its_head(sam2: Path, world: Path, tmp_path: Path) -> None:
    settings = [f"data.root={world}", "data.workers=0", f"output={tmp_path}", "teacher.kind=sam2", "cache.mode=online",
                f"teacher.path={sam2}", "teacher.image_size=null"]  # fmt: skip
    parts = EncoderParts(load_config("encoder/sandbox", settings))
    task = parts.task(parts.running())
    batch = task.to(task.collate([task.dataset(0)[index] for index in range(4)]), torch.device("cpu"))
    student = task.build_student().eval()
    term = task.terms(student, batch)["mse"].value
    with torch.no_grad():
        levels = student.image_levels(task.teacher.pixels(batch.images))
    errors = [((own - wanted) ** 2).sum(1).mean() for own, wanted in zip(levels, batch.teacher_features, strict=True)]
    torch.testing.assert_close(term.detach(), sum(errors) / 3)
    term.backward()
    for head in (*student.fine_heads, student.head):
        assert all(parameter.grad.abs().sum() > 0 for parameter in head.output.parameters())


def test_a_sam_goes_the_whole_road(sam: Path, world: Path, tmp_path: Path) -> None:
    settings = ["data.workers=0", "evaluate.prompts=[box]", "evaluate.images=4", "train.warmup_epochs=0.2"]
    result = distill("encoder", world, teacher=str(sam), student="es_ev_s", out=tmp_path / "run",
                     train={"epochs": 1}, overrides=settings)  # fmt: skip
    assert (result.config.teacher.kind, result.config.data.geometry) == ("sam", "longest_side")
    model = load_promptable(tmp_path / "run")
    assert own_geometry(model) == "longest_side"
    merge(result.trained.checkpoint, sam, tmp_path / "again")  # a checkpoint has no configuration of the trunk
    assert inputs_of(load_promptable(tmp_path / "again").config) == inputs_of(model.config)
    trained = torch.load(result.trained.checkpoint, weights_only=True)["model"]
    state = model.vision_encoder.backbone.state_dict()
    assert set(state) == set(trained) and all(torch.equal(state[name], trained[name]) for name in trained)
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["models"]
    teacher, untrained, distilled = (row["trunk_parameters"] for row in rows)
    assert teacher != untrained == distilled == sum(p.numel() for p in model.vision_encoder.parameters())


def test_training_and_inference_read_the_same_pixels(sam: Path) -> None:
    info = describe_teacher(TeacherConfig(kind="sam", path=str(sam)))
    canvas = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    size = torch.tensor([[64, 30]])
    batch = ImageBatch(canvas, size, size, ("a",), torch.zeros(1, dtype=torch.int64))
    pixels = info.pixels(batch)
    assert torch.equal(pixels, sam_pixels(load_promptable(sam), batch))
    assert not pixels[..., 30:].any() and pixels[..., :30].all()


def test_the_kind_of_a_teacher_is_found(sam: Path, sam2: Path, tmp_path: Path) -> None:
    assert teacher_kind(str(sam)) == "sam" and teacher_kind("sandbox") == "sam3"
    assert teacher_kind(str(sam2)) == "sam2"
    (tmp_path / "empty").mkdir()
    assert teacher_kind(str(tmp_path / "empty")) == "sam3"
    with pytest.raises(UserError, match="no such file or folder"):
        teacher_kind(str(tmp_path / "none.pth"))


def test_an_original_file_is_the_same_teacher(sam: Path, tmp_path: Path) -> None:
    from original_names import sam_to_original

    model = SamModel.from_pretrained(sam)
    state, _ = sam_to_original(model.state_dict())
    torch.save({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "sam.pth")
    assert teacher_kind(str(tmp_path / "sam.pth")) == "sam"
    batch = ImageBatch.full(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    first, second = (build_teacher(TeacherConfig(kind="sam", path=str(p))) for p in (sam, tmp_path / "sam.pth"))
    torch.testing.assert_close(first.maps(batch)[0], second.maps(batch)[0])
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not an original SAM or SAM 2, by its tensor names"):
        build_teacher(TeacherConfig(kind="sam", path=str(tmp_path / "other.pth")))


def test_a_teacher_that_can_host_no_trunk_is_not_merged(recipe, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(TEACHERS.get("sam3"), "model_types", ())
    assert merge_student(recipe(tmp_path / "run")) is None
    assert "left out: a sam3 teacher has no place for the trunk" in capsys.readouterr().out
