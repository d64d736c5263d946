"""Settings of a small SAM 2, for every test that builds one."""

from __future__ import annotations

from typing import Any


def sam2_settings(width: int, side: int = 64, heads: int = 2, **trunk: object) -> dict[str, Any]:
    """Return the arguments of ``Sam2Config`` or ``Sam2VideoConfig``: a trunk of four stages and five blocks.

    Args:
        width: Channels of the levels and of the mask decoder.
        side: Side of the input in pixels, a multiple of 64.
        heads: Attention heads of the mask decoder.
        trunk: Further settings of the trunk.
    """
    hiera = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [side, side], "num_attention_heads": 1,
        "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3], **trunk,
    }  # fmt: skip
    vision = {
        "model_type": "sam2_vision_model", "backbone_config": hiera, "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[side // stride] * 2 for stride in (4, 8, 16)], "fpn_hidden_size": width,
    }  # fmt: skip
    decoder = {"hidden_size": width, "mlp_dim": 32, "num_attention_heads": heads, "iou_head_hidden_dim": 16}
    return {
        "vision_config": vision, "mask_decoder_config": decoder,
        "prompt_encoder_config": {"hidden_size": width, "image_size": side, "patch_size": 16},
    }  # fmt: skip
