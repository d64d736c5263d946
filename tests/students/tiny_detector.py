"""A detection student of a few thousand weights."""

from __future__ import annotations

import torch
from tensors import scramble

from samdistill.students import EfficientSam3Config, EfficientSam3Model, efficient_sam3_config

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 1000,
    "projection_dim": 32,
}  # fmt: skip
ANSWERS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")


def tiny_config(backbone: str = "es_ev_s", repmixer: bool = True, layers: int = 2) -> EfficientSam3Config:
    return efficient_sam3_config(
        backbone=backbone, image_size=126, hidden_size=32, heads=4, ffn=64, encoder_layers=layers,
        decoder_layers=layers, queries=10, text={**TEXT, "use_repmixer_blocks": repmixer},
    )  # fmt: skip


def tiny(backbone: str = "es_ev_s", repmixer: bool = True) -> EfficientSam3Model:
    torch.manual_seed(0)
    model = EfficientSam3Model(tiny_config(backbone, repmixer)).eval()
    scramble(model)
    return model
