"""The concept detector of the sandbox: a tiny SAM 3 with the trunk of the bundled tracker, and its initialisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import Sam3Config, Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3DecoderMLP

from samdistill.checkpoints.promptable import load_promptable
from samdistill.sandbox.concepts import CONTEXT, VOCABULARY
from tracker_model import IMAGE_SIZE, PATCH, teacher_config

HIDDEN, FFN, LAYERS = 96, 384, 3
QUERIES_A_SIDE = 5
QUERIES = QUERIES_A_SIDE**2


def detector_config() -> Sam3Config:
    """Return the configuration: 126 px, the tracker's ViT, heads of width 96 with 25 queries, 5.2M parameters."""
    grid = IMAGE_SIZE // PATCH
    heads = {"hidden_size": HIDDEN, "num_attention_heads": 4, "intermediate_size": FFN, "dropout": 0.0}
    return Sam3Config(
        vision_config={
            "model_type": "sam3_vision_model",
            "backbone_config": teacher_config().vision_config.backbone_config.to_dict(),
            "fpn_hidden_size": HIDDEN,
            "scale_factors": [4.0, 2.0, 1.0, 0.5],
            "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
        },
        text_config={
            "model_type": "clip_text_model", "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(VOCABULARY), "projection_dim": HIDDEN,
            "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": CONTEXT,
        },
        geometry_encoder_config={**heads, "num_layers": 1, "roi_size": 3},
        detr_encoder_config={**heads, "num_layers": LAYERS},
        detr_decoder_config={**heads, "num_layers": LAYERS, "num_queries": QUERIES},
        mask_decoder_config={"hidden_size": HIDDEN, "num_attention_heads": 4, "num_upsampling_stages": 2},
    )  # fmt: skip


@torch.no_grad()
def build_detector_teacher(seed: int = 0) -> Sam3Model:
    """Build an untrained detector on the trunk of the bundled tracker.

    transformers' initialisation (standard deviation 0.02) is for fine-tuning; a DETR trains very slowly from it. Here,
    the variance of linear layers depends on their width, reference boxes of the queries are on a grid, and the
    decoder's position bias starts as attention inside the box.
    """
    torch.manual_seed(seed)
    model = Sam3Model(detector_config())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)
    model.vision_encoder.backbone.load_state_dict(load_promptable("sandbox").vision_encoder.backbone.state_dict())
    decoder = model.detr_decoder
    decoder.reference_points.weight.copy_(_grid_boxes())
    for head in (decoder.box_head, decoder.presence_head):
        nn.init.zeros_(head.layer3.weight)
    for bias in (decoder.box_rpb_embed_x, decoder.box_rpb_embed_y):
        _attend_inside(bias)
    return model


def _grid_boxes() -> Tensor:
    """Return boxes (cxcywh, before the sigmoid) with centres on a grid and sides of a third of the image."""
    steps = (torch.arange(QUERIES_A_SIDE) + 0.5) / QUERIES_A_SIDE
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    size = torch.full_like(x, 1 / 3)
    return torch.logit(torch.stack([x, y, size, size], -1).flatten(0, 1))


def _attend_inside(embed: Sam3DecoderMLP) -> None:
    """Initialise a position bias so that cells outside the box get a penalty proportional to their log distance.

    The inputs are the distances to the two edges. The first is negative before the box, the second positive after it.
    """
    embed.layer1.weight[:2] = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    embed.layer1.bias[:2] = 0
    embed.layer2.weight.mul_(0.1)
    heads = embed.layer2.weight.shape[0]
    strength = torch.tensor([6.0, 6.0, 3.0, 1.0]).repeat(math.ceil(heads / 4))[:heads]
    embed.layer2.weight[:, :2] = -strength[:, None]
