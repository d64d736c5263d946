"""Tiny SAM, SAM 2 and SAM 3 models with random weights, saved as the folders a user would have."""

import pytest
import torch
import transformers
from original_names import to_original
from small_sams import sam2_settings
from transformers import (
    Sam2Config,
    Sam2Model,
    Sam3Config,
    Sam3Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    SamConfig,
    SamModel,
)

from samdistill.sandbox.concepts import CONTEXT, VOCABULARY, sandbox_words

VIT = {
    "model_type": "sam3_vit_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 126, "patch_size": 14, "window_size": 3, "global_attn_indexes": [1],
    "pretrain_image_size": 42,
}  # fmt: skip
VISION = {
    "model_type": "sam3_vision_model", "backbone_config": VIT, "fpn_hidden_size": 32,
    "backbone_feature_sizes": [[36, 36], [18, 18], [9, 9]],
}  # fmt: skip
HEADS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def sam3_config() -> Sam3Config:
    text = {
        "model_type": "clip_text_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 1000, "projection_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return Sam3Config(
        vision_config=VISION, text_config=text, geometry_encoder_config={**HEADS, "roi_size": 3, "num_layers": 1},
        detr_encoder_config={**HEADS, "num_layers": 1},
        detr_decoder_config={**HEADS, "num_layers": 1, "num_queries": 10}, mask_decoder_config=HEADS,
    )  # fmt: skip


def scramble(model: torch.nn.Module) -> torch.nn.Module:
    """Every tensor random: transformers starts biases, norms and some embeddings at constants, which hides mistakes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def sam3(tmp_path_factory):
    """(model, folder) of a tiny Sam3Model."""
    model = scramble(Sam3Model(sam3_config()))
    folder = tmp_path_factory.mktemp("sam3")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """(model, folder) of a tiny Sam3Model that reads the sandbox's words, its tokenizer beside it."""
    config = sam3_config()
    config.text_config.vocab_size, config.text_config.max_position_embeddings = len(VOCABULARY), CONTEXT
    model = scramble(Sam3Model(config))
    folder = tmp_path_factory.mktemp("detector")
    model.save_pretrained(folder)
    sandbox_words().save(folder)
    return model, folder


@pytest.fixture(scope="session")
def tracker(tmp_path_factory):
    config = Sam3TrackerConfig(
        vision_config=VISION | {"scale_factors": [4.0, 2.0, 1.0]},
        prompt_encoder_config={"hidden_size": 32, "image_size": 126, "patch_size": 14},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    )
    model = scramble(Sam3TrackerModel(config))
    folder = tmp_path_factory.mktemp("tracker")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="session")
def original(sam3, tmp_path_factory):
    """The same weights as ``sam3`` in the layout of ``sam3.pt``, with what the real file has besides."""
    model, folder = sam3
    state, left = to_original(model.state_dict())
    assert not left
    state["detector.backbone.vision_backbone.trunk.blocks.1.attn.freqs_cis"] = torch.randn(4, 8)
    state["tracker.no_mem_embed"] = torch.randn(1, 1, 32)
    path = tmp_path_factory.mktemp("original") / "sam3.pt"
    torch.save({"model": {k: v.clone() for k, v in state.items()}}, path)
    (path.parent / "config.json").write_text((folder / "config.json").read_text())
    return path


@pytest.fixture(scope="session")
def sam(tmp_path_factory):
    vision = {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
        "patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48,
    }  # fmt: skip
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 16}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    model = scramble(SamModel(config))
    folder = tmp_path_factory.mktemp("sam")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="session")
def sam2(tmp_path_factory):
    model = scramble(Sam2Model(Sam2Config(**sam2_settings(16, 128))))
    folder = tmp_path_factory.mktemp("sam2")
    model.save_pretrained(folder)
    return model, folder
