"""Tiny SAM 3 hosts in every layout, and students that fit them."""

import pytest
import torch
import transformers
from original_names import to_original
from small_students import HIDDEN, make_student
from transformers import (
    Sam3Config,
    Sam3Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3VideoConfig,
    Sam3VideoModel,
)

VIT = {
    "model_type": "sam3_vit_model", "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 126, "patch_size": 14, "window_size": 3, "global_attn_indexes": [1],
    "pretrain_image_size": 42,
}  # fmt: skip
TEXT = {
    "model_type": "clip_text_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "vocab_size": 1000, "projection_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def vision(fpn: int) -> dict:
    return {
        "model_type": "sam3_vision_model", "backbone_config": VIT, "fpn_hidden_size": fpn,
        "backbone_feature_sizes": [[36, 36], [18, 18], [9, 9]],
    }  # fmt: skip


def detector_config(width: int = 32) -> Sam3Config:
    heads = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 64}
    return Sam3Config(
        vision_config=vision(width), text_config=TEXT,
        geometry_encoder_config={**heads, "roi_size": 3, "num_layers": 1},
        detr_encoder_config={**heads, "num_layers": 1},
        detr_decoder_config={**heads, "num_layers": 1, "num_queries": 10}, mask_decoder_config=heads,
    )  # fmt: skip


def tracker_parts(width: int) -> dict:
    return {
        "prompt_encoder_config": {"hidden_size": width, "image_size": 126, "patch_size": 14},
        "mask_decoder_config": {
            "hidden_size": width, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": width
        },
    }  # fmt: skip


def tracker_config() -> Sam3TrackerConfig:
    return Sam3TrackerConfig(vision_config=vision(32) | {"scale_factors": [4.0, 2.0, 1.0]}, **tracker_parts(32))


def video_config() -> Sam3VideoConfig:
    width = 128  # the video tracker's memory needs a multiple of 64 above 64
    tracker = {
        "model_type": "sam3_tracker_video", "vision_config": vision(width), **tracker_parts(width), "image_size": 126,
        "memory_attention_hidden_size": width, "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 64, "memory_attention_rope_feat_sizes": [9, 9],
        "memory_encoder_hidden_size": width, "mask_downsampler_embed_dim": width, "memory_fuser_embed_dim": width,
        "memory_fuser_intermediate_dim": 64, "memory_fuser_num_layers": 1,
    }  # fmt: skip
    return Sam3VideoConfig(
        detector_config=detector_config(width).to_dict(), tracker_config=tracker, low_res_mask_size=36
    )


MODELS = {
    "sam3": lambda: Sam3Model(detector_config()),
    "tracker": lambda: Sam3TrackerModel(tracker_config()),
    "video": lambda: Sam3VideoModel(video_config()),
}


def scramble(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """Name to (model, folder): each layout that a student can be merged into."""
    made = {}
    for name, build in MODELS.items():
        transformers.logging.set_verbosity_error()
        model = scramble(build())
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text('{"size": {"height": 126, "width": 126}}')
        (folder / "tokenizer.json").write_text('{"tiny": true}')
        (folder / "README.md").write_text("the teacher's model card")
        made[name] = (model, folder)
    return made


@pytest.fixture(scope="session")
def original_state(hosts) -> dict[str, torch.Tensor]:
    """The tensors of a ``sam3.pt``, with what the published one has beside those of ``Sam3Model``."""
    state, left = to_original(hosts["sam3"][0].state_dict())
    assert not left
    state["detector.backbone.vision_backbone.trunk.blocks.1.attn.freqs_cis"] = torch.randn(4, 8)
    state["detector.backbone.vision_backbone.sam2_convs.2.conv_1x1.weight"] = torch.randn(32, HIDDEN, 1, 1)
    state["detector.geometry_encoder.points_direct_project.weight"] = torch.randn(32, 2)
    state["tracker.no_mem_embed"] = torch.randn(1, 1, 32)
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture(scope="session")
def original(original_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "sam3.pt"
    torch.save({"model": original_state}, path)
    return path


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """(student, run folder) with the folder ``student/`` in it."""
    model = make_student()
    run = tmp_path_factory.mktemp("run")
    model.save_pretrained(run / "student")
    (run / "config.yaml").write_text("job: encoder\n")
    return model, run
