"""A SAM 2 with a distilled trunk: its decoder and its memory are unchanged, in transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_sams import sam2_settings
from torch.nn import functional as F
from transformers import (
    AutoProcessor,
    Sam2Model,
    Sam2Processor,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VideoProcessor,
    pipeline,
)
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

import samdistill
from samdistill.checkpoints.merge import merge
from samdistill.checkpoints.promptable import load_promptable
from samdistill.config import TeacherConfig
from samdistill.ops.images import IMAGENET_MEAN, IMAGENET_STD
from samdistill.ops.promptable import embed, predict
from samdistill.students import HostedSam2VisionModel, StudentTrunk, StudentTrunkConfig, expansion
from samdistill.teachers import Sam3Detector, describe_teacher, teacher_kind
from samdistill.types import ImageBatch, Prompts, UserError

WIDTH, SIDE = 128, 64  # transformers' memory needs a multiple of 64 above 64
FINE = (WIDTH // 8, WIDTH // 4)


def video_config() -> Sam2VideoConfig:
    return Sam2VideoConfig(
        **sam2_settings(WIDTH, SIDE, 4),
        image_size=SIDE, memory_attention_hidden_size=WIDTH, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32, memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=WIDTH, mask_downsampler_embed_dim=WIDTH, memory_fuser_embed_dim=WIDTH,
        memory_fuser_intermediate_dim=32, memory_fuser_num_layers=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> tuple[Sam2VideoModel, Path]:
    model, made = Sam2VideoModel(video_config()).eval(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=made) * 0.1
    folder = tmp_path_factory.mktemp("sam2")
    model.save_pretrained(folder)
    return model, folder


def build_trunk(**changes) -> StudentTrunk:
    torch.manual_seed(1)
    settings = {"hidden_size": WIDTH, "patch_size": 16, "image_size": SIDE, "fine_channels": FINE,
                "host_mean": IMAGENET_MEAN, "host_std": IMAGENET_STD} | changes  # fmt: skip
    return StudentTrunk(StudentTrunkConfig(backbone="es_ev_s", **settings)).eval()


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> tuple[StudentTrunk, Path]:
    model, folder = build_trunk(), tmp_path_factory.mktemp("trunk")
    model.save_pretrained(folder / "student")
    return model, folder


@pytest.fixture(scope="module")
def merged(teacher, trunk, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "merged"
    merge(trunk[1], teacher[1], out)
    return out


def test_the_decoder_reads_the_levels_that_the_trunk_predicts(teacher, trunk, merged: Path) -> None:
    model = Sam2Model.from_pretrained(merged).eval()
    assert type(model.vision_encoder) is HostedSam2VisionModel
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        read = model.get_image_embeddings(pixels)
        *fine, embedding = trunk[0].image_levels(pixels)
        wanted = [*fine, embedding + teacher[0].no_memory_embedding.view(1, -1, 1, 1)]
    for own, level in zip(read, wanted, strict=True):
        torch.testing.assert_close(own, level, atol=1e-5 * level.abs().max().item(), rtol=0)


def test_everything_but_the_image_encoder_is_kept(teacher, trunk, merged: Path) -> None:
    before, after = load_file(teacher[1] / "model.safetensors"), load_file(merged / "model.safetensors")
    kept = {name for name in before if not name.startswith("vision_encoder.")}
    assert any(name.startswith("memory_attention.") for name in kept)
    assert all(torch.equal(after[name], before[name]) for name in kept)
    own = {f"vision_encoder.backbone.{name}" for name in trunk[0].state_dict()}
    grown = {f"vision_encoder.expand.{n}.{part}" for n in (0, 1) for part in ("weight", "bias")}
    assert set(after) == kept | own | grown
    for kind in (Sam2VideoModel, Sam2Model):
        _, found = kind.from_pretrained(merged, output_loading_info=True)
        assert not any(found.values())


def track(model: Sam2VideoModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    session = Sam2VideoInferenceSession(video=pixels, video_height=SIDE, video_width=SIDE, dtype=torch.float32)
    session.obj_id_to_idx(1)
    session.obj_with_new_inputs = [1]
    corners, labels = torch.tensor([[[[10.0, 10.0], [50.0, 40.0]]]]), torch.tensor([[[2, 3]]], dtype=torch.int32)
    session.add_point_inputs(0, 0, {"point_coords": corners, "point_labels": labels})
    with torch.no_grad():
        return [model(inference_session=session, frame_idx=frame).pred_masks for frame in range(len(pixels))]


def test_the_memory_of_the_teacher_tracks_on_the_levels_of_the_trunk(teacher, merged: Path) -> None:
    """The teacher's own modules, given the image encoder of the merged model, are the reference."""
    pixels = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    model = Sam2VideoModel.from_pretrained(merged).eval()
    reference = Sam2VideoModel.from_pretrained(teacher[1]).eval()
    own = track(reference, pixels)
    reference.vision_encoder = model.vision_encoder
    for ours, theirs, other in zip(track(model, pixels), track(reference, pixels), own, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, other)


def test_the_folder_predicts_and_has_the_processor_of_a_video_model(merged: Path) -> None:
    assert samdistill.load(merged).kind == "promptable"
    model = load_promptable(merged)
    assert type(model) is Sam2Model
    batch = ImageBatch.full(torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8))
    prompts = Prompts(torch.ones(1, 2, dtype=torch.bool), torch.tensor([[[[5.0, 5.0]], [[40.0, 30.0]]]]),
                      torch.ones(1, 2, 1, dtype=torch.int64))  # fmt: skip
    with torch.no_grad():
        assert predict(model, embed(model, batch), prompts, True).low_res_masks.shape == (1, 2, 3, 16, 16)
    processor = AutoProcessor.from_pretrained(merged)
    assert type(processor) is Sam2VideoProcessor
    assert processor.video_processor.size.height == SIDE
    assert list(processor.image_processor.image_mean) == [0.485, 0.456, 0.406]
    assert type(pipeline("mask-generation", model=str(merged), device="cpu").model) is Sam2Model


def test_what_cannot_use_the_folder_says_so_in_one_line(merged: Path) -> None:
    with pytest.raises(UserError, match="its image encoder is a 'samdistill_sam2_vision'; give a teacher with its own"):
        describe_teacher(TeacherConfig(kind=teacher_kind(str(merged)), path=str(merged)))
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    for attempt in (
        lambda: samdistill.predict(image, merged, text="dog"), lambda: samdistill.load(merged)(image, text="dog"),
        lambda: samdistill.load(merged).track("clip.mp4", "dog"), lambda: Sam3Detector(TeacherConfig(path=str(merged))),
    ):  # fmt: skip
        with pytest.raises(UserError) as refused:
            attempt()
        assert "\n" not in str(refused.value)


def test_an_image_model_stays_one(teacher, trunk, tmp_path: Path) -> None:
    load_promptable(teacher[1]).save_pretrained(tmp_path / "image")
    merge(trunk[1], tmp_path / "image", tmp_path / "merged")
    _, found = Sam2Model.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(found.values())
    assert type(AutoProcessor.from_pretrained(tmp_path / "merged")) is Sam2Processor


def test_what_does_not_fit_is_refused_in_one_line(teacher, trunk, tmp_path: Path) -> None:
    build_trunk(fine_channels=()).save_pretrained(tmp_path / "coarse")
    with pytest.raises(UserError, match=r"a trunk for another host: fine levels of these channels: \[\], but"):
        merge(tmp_path / "coarse", teacher[1], tmp_path / "out")
    broken = Sam2VideoModel.from_pretrained(teacher[1])
    broken.mask_decoder.conv_s0.weight.data[1] = broken.mask_decoder.conv_s0.weight.data[0]
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="its projection of fine level 0 has no inverse"):
        merge(trunk[1], tmp_path / "broken", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_expansion_is_undone_by_the_projection() -> None:
    made = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(5, 12, 1, 1, generator=made), torch.randn(5, generator=made)
    maps = torch.randn(2, 5, 3, 4, generator=made)
    torch.testing.assert_close(F.conv2d(F.conv2d(maps, *expansion(weight, bias)), weight, bias), maps)
    with pytest.raises(ValueError, match="linearly dependent"):
        expansion(torch.ones(2, 12, 1, 1), bias[:2])
