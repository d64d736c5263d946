"""Configurations of tiny SAM 3 detectors and trackers, with random weights."""

from __future__ import annotations

from small_students import HIDDEN
from transformers import Sam3Config, Sam3TrackerConfig, Sam3TrackerVideoConfig, Sam3VideoConfig

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


def memory_config() -> Sam3TrackerVideoConfig:
    width = 128  # the video tracker's memory needs a multiple of 64 above 64
    return Sam3TrackerVideoConfig(
        vision_config=vision(width), **tracker_parts(width), image_size=126,
        memory_attention_hidden_size=width, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=64, memory_attention_rope_feat_sizes=[9, 9],
        memory_encoder_hidden_size=width, mask_downsampler_embed_dim=width, memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=64, memory_fuser_num_layers=1,
    )  # fmt: skip


def video_config() -> Sam3VideoConfig:
    detector, tracker = detector_config(128).to_dict(), memory_config().to_dict()
    return Sam3VideoConfig(detector_config=detector, tracker_config=tracker, low_res_mask_size=36)
