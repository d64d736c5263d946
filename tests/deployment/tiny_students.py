"""Random models that are exported in a short time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Sam2Config, Sam2Model, Sam3TrackerConfig, Sam3TrackerModel, SamConfig, SamModel

from samdistill.checkpoints.words import Words
from samdistill.inference.concepts import StudentDetector
from samdistill.sandbox.concepts import CONTEXT, VOCABULARY, build_tokenizer
from samdistill.students import (
    EfficientSam3Model,
    HostedSamModel,
    StudentTrunk,
    StudentTrunkConfig,
    efficient_sam3_config,
    host_trunk,
)


def tiny_detector(latents: int = 0, image_size: int = 64) -> StudentDetector:
    """Build a detection student, with a memory of three frames unless ``latents`` is 0, with its tokenizer."""
    torch.manual_seed(0)
    config = efficient_sam3_config(
        backbone="es_ev_s", image_size=image_size, hidden_size=32, heads=4, ffn=64, encoder_layers=1, decoder_layers=1,
        queries=6, text={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "projection_dim": 32,
                         "num_attention_heads": 2, "vocab_size": len(VOCABULARY)},
    )  # fmt: skip
    config.memory_latents, config.memory_layers, config.memory_windows = latents, 1, 2
    config.memory_context, config.memory_stride, config.memory_level, config.memory_phrase = 3, 2, 3, "circle"
    return StudentDetector(EfficientSam3Model(config).eval(), Words(build_tokenizer(), CONTEXT))


def save_tiny(folder: Path, latents: int = 12) -> Path:
    """Save a student at 126 px with its tokenizer, and with a memory of three frames unless ``latents`` is 0."""
    student = tiny_detector(latents, 126)
    student.model.save_pretrained(folder)
    student.words.save(folder)
    return folder


def tiny_tracker() -> Sam3TrackerModel:
    """Build a SAM 3 tracker at 126 px."""
    torch.manual_seed(0)
    trunk = {
        "model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 126, "patch_size": 14, "window_size": 3, "global_attn_indexes": [1],
        "pretrain_image_size": 42,
    }  # fmt: skip
    vision = {
        "model_type": "sam3_vision_model", "backbone_config": trunk, "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[36, 36], [18, 18], [9, 9]], "scale_factors": [4.0, 2.0, 1.0],
    }  # fmt: skip
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
    config = Sam3TrackerConfig(
        vision_config=vision, prompt_encoder_config={"hidden_size": 32, "image_size": 126, "patch_size": 14},
        mask_decoder_config=decoder,
    )  # fmt: skip
    return Sam3TrackerModel(config).eval()


def tiny_sam2() -> Sam2Model:
    """Build a SAM 2 at 64 px that hosts a trunk."""
    torch.manual_seed(0)
    vision = {
        "model_type": "sam2_vision_model", "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32,
        "backbone_config": {"model_type": "sam2_hiera_det_model", "image_size": [64, 64]},
    }  # fmt: skip
    prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 16}
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 4, "iou_head_hidden_dim": 16}
    model = Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    return host_trunk(model.eval(), _trunk(32, (4, 8)))


def hosted_sam() -> HostedSamModel:
    """Build a SAM at 64 px that hosts a trunk."""
    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 16}
    vision = {**sizes, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_pos_feats": 16}
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 4, "iou_head_hidden_dim": 16}
    config = SamConfig(vision_config=vision, prompt_encoder_config={**sizes, "hidden_size": 32},
                       mask_decoder_config=decoder)  # fmt: skip
    return host_trunk(SamModel(config).eval(), _trunk(32, ()))


def _trunk(channels: int, fine: tuple[int, ...]) -> StudentTrunk:
    config = StudentTrunkConfig(backbone="es_ev_s", hidden_size=channels, patch_size=16, image_size=64,
                                fine_channels=fine)  # fmt: skip
    return StudentTrunk(config).eval()
