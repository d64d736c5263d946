"""The name table against an independent map of ordered substitutions, and against the full-size model."""

import re

import pytest
import torch
from original_names import to_original
from transformers import Sam3Config, Sam3Model

from samdistill.checkpoints.rename import hf_names, to_hf
from samdistill.types import UserError

# Strip ``detector.``, then substitute in order. Checked once against the names and shapes of sam3.pt; the code's table
# is written in another form (one row per module, both directions).
REFERENCE = [
    (r"^backbone\.vision_backbone\.trunk\.", "vision_encoder.backbone."),
    (r"backbone\.pos_embed$", "backbone.embeddings.position_embeddings"),
    (r"patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"backbone\.ln_pre\.", "backbone.layer_norm."),
    (r"backbone\.blocks\.(\d+)\.norm(\d)\.", r"backbone.layers.\1.layer_norm\2."),
    (r"backbone\.blocks\.(\d+)\.attn\.proj\.", r"backbone.layers.\1.attention.o_proj."),
    (r"backbone\.blocks\.(\d+)\.attn\.", r"backbone.layers.\1.attention."),
    (r"backbone\.blocks\.", "backbone.layers."),
    (r"^backbone\.vision_backbone\.convs\.(\d+)\.", r"vision_encoder.neck.fpn_layers.\1."),
    (r"\.dconv_2x2(_0)?\.", ".scale_layers.0."),
    (r"\.dconv_2x2_1\.", ".scale_layers.2."),
    (r"\.conv_1x1\.", ".proj1."),
    (r"\.conv_3x3\.", ".proj2."),
    (r"^backbone\.language_backbone\.resizer\.", "text_projection."),
    (r"^backbone\.language_backbone\.encoder\.", "text_encoder."),
    (r"^text_encoder\.text_projection$", "text_encoder.text_projection.weight"),
    (r"^text_encoder\.token_embedding", "text_encoder.text_model.embeddings.token_embedding"),
    (r"^text_encoder\.positional_embedding$", "text_encoder.text_model.embeddings.position_embedding.weight"),
    (r"^text_encoder\.ln_final", "text_encoder.text_model.final_layer_norm"),
    (
        r"^text_encoder\.transformer\.resblocks\.(\d+)\.attn\.",
        r"text_encoder.text_model.encoder.layers.\1.self_attn.",
    ),
    (
        r"^text_encoder\.transformer\.resblocks\.(\d+)\.ln_(\d)",
        r"text_encoder.text_model.encoder.layers.\1.layer_norm\2",
    ),
    (
        r"^text_encoder\.transformer\.resblocks\.(\d+)\.mlp\.c_fc",
        r"text_encoder.text_model.encoder.layers.\1.mlp.fc1",
    ),
    (
        r"^text_encoder\.transformer\.resblocks\.(\d+)\.mlp\.c_proj",
        r"text_encoder.text_model.encoder.layers.\1.mlp.fc2",
    ),
    (r"^geometry_encoder\.encode_norm", "geometry_encoder.output_layer_norm"),
    (r"^geometry_encoder\.norm", "geometry_encoder.prompt_layer_norm"),
    (r"^geometry_encoder\.img_pre_norm", "geometry_encoder.vision_layer_norm"),
    (r"^geometry_encoder\.encode\.", "geometry_encoder.layers."),
    (r"^transformer\.encoder\.", "detr_encoder."),
    (r"cross_attn_image", "cross_attn"),
    (r"^transformer\.decoder\.", "detr_decoder."),
    (r"^(detr_decoder\.layers\.\d+)\.cross_attn\.", r"\1.vision_cross_attn."),
    (r"\.ca_text\.", ".text_cross_attn."),
    (r"\.catext_norm\.", ".text_cross_attn_layer_norm."),
    (r"^(detr_decoder\.layers\.\d+)\.norm1", r"\1.vision_cross_attn_layer_norm"),
    (r"^(detr_decoder\.layers\.\d+)\.norm2", r"\1.self_attn_layer_norm"),
    (r"^(detr_decoder\.layers\.\d+)\.norm3", r"\1.mlp_layer_norm"),
    (r"presence_token_head", "presence_head"),
    (r"presence_token_out_norm", "presence_layer_norm"),
    (r"^detr_decoder\.norm", "detr_decoder.output_layer_norm"),
    (r"bbox_embed", "box_head"),
    (r"boxRPB", "box_rpb"),
    (r"^dot_prod_scoring\.", "dot_product_scoring."),
    (r"prompt_mlp\.out_norm", "text_mlp_out_norm"),
    (r"prompt_mlp", "text_mlp"),
    (r"prompt_proj", "text_proj"),
    (r"hs_proj", "query_proj"),
    (
        r"^(detr_decoder\.(?:presence_head|box_head|ref_point_head|box_rpb_embed_[xy])|dot_product_scoring\.text_mlp)"
        r"\.layers\.(\d)",
        lambda m: f"{m[1]}.layer{int(m[2]) + 1}",
    ),
    (r"^segmentation_head\.mask_predictor\.mask_embed", "mask_decoder.mask_embedder"),
    (r"^segmentation_head\.instance_seg_head", "mask_decoder.instance_projection"),
    (r"^segmentation_head\.semantic_seg_head", "mask_decoder.semantic_projection"),
    (r"^segmentation_head\.cross_attend_prompt", "mask_decoder.prompt_cross_attn"),
    (r"^segmentation_head\.cross_attn_norm", "mask_decoder.prompt_cross_attn_norm"),
    (r"^segmentation_head\.", "mask_decoder."),
    (r"^((?:geometry_encoder|detr_encoder|detr_decoder)\.layers\.\d+)\.linear(\d)", r"\1.mlp.fc\2"),
    (r"^((?:geometry_encoder|detr_encoder)\.layers\.\d+)\.norm(\d)", r"\1.layer_norm\2"),
    (r"^((?:geometry_encoder|detr_encoder|detr_decoder|mask_decoder).*attn)\.out_proj\.", r"\1.o_proj."),
]


def reference(original: str) -> list[str]:
    name = original.removeprefix("detector.")
    for pattern, replacement in REFERENCE:
        name = re.sub(pattern, replacement, name)
    for fused in ("qkv.", "in_proj_"):
        if fused in name:
            return [name.replace(fused, f"{part}_proj.") for part in "qkv"]
    return [name]


@pytest.fixture(scope="module")
def full_size() -> dict[str, torch.Tensor]:
    """The state dict of the 840M model, without memory."""
    with torch.device("meta"):
        return Sam3Model(Sam3Config()).state_dict()


def test_all_1468_names_survive_the_way_there_and_back_with_their_shapes(full_size):
    assert len(full_size) == 1468
    original, left = to_original(full_size)
    assert not left and all(name.startswith("detector.") for name in original)
    back, left = to_hf(original)
    assert not left
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in full_size.items()}


def test_the_original_names_are_those_the_reference_map_translates(full_size):
    original, _ = to_original(full_size)
    for name in original:
        assert list(hf_names(name)) == reference(name)
    assert {hf for name in original for hf in reference(name)} == set(full_size)


def test_known_original_names_and_shapes(full_size):
    """Names and shapes of the published sam3.pt."""
    original, _ = to_original(full_size)
    expected = {
        "backbone.vision_backbone.trunk.pos_embed": (1, 577, 1024),
        "backbone.vision_backbone.trunk.patch_embed.proj.weight": (1024, 3, 14, 14),
        "backbone.vision_backbone.trunk.ln_pre.bias": (1024,),
        "backbone.vision_backbone.trunk.blocks.31.attn.qkv.weight": (3072, 1024),
        "backbone.vision_backbone.convs.0.dconv_2x2_0.weight": (1024, 512, 2, 2),
        "backbone.vision_backbone.convs.0.dconv_2x2_1.weight": (512, 256, 2, 2),
        "backbone.vision_backbone.convs.1.dconv_2x2.weight": (1024, 512, 2, 2),
        "backbone.vision_backbone.convs.3.conv_1x1.weight": (256, 1024, 1, 1),
        "backbone.language_backbone.encoder.text_projection": (1024, 512),
        "backbone.language_backbone.encoder.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
        "backbone.language_backbone.encoder.positional_embedding": (32, 1024),
        "backbone.language_backbone.resizer.weight": (256, 1024),
        "transformer.encoder.layers.5.cross_attn_image.in_proj_bias": (768,),
        "transformer.decoder.layers.0.ca_text.out_proj.weight": (256, 256),
        "transformer.decoder.bbox_embed.layers.2.weight": (4, 256),
        "transformer.decoder.boxRPB_embed_x.layers.1.weight": (8, 256),
        "segmentation_head.pixel_decoder.conv_layers.0.weight": (256, 256, 3, 3),
        "dot_prod_scoring.prompt_mlp.layers.0.weight": (2048, 256),
        "geometry_encoder.encode.2.cross_attn_image.in_proj_weight": (768, 256),
    }
    assert {k: tuple(original[f"detector.{k}"].shape) for k in expected} == expected


def test_values_come_back_bit_for_bit(hosts):
    model = hosts["sam3"][0]
    state = model.state_dict()
    original, _ = to_original(state)
    back, left = to_hf(original)
    assert not left and back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    model.load_state_dict(back, strict=True)


def test_the_three_value_changes_by_hand():
    trunk = "detector.backbone.vision_backbone.trunk."
    fused = torch.arange(6.0)[:, None].expand(6, 2)
    state = {
        f"{trunk}pos_embed": torch.arange(5.0).view(1, 5, 1),
        f"{trunk}blocks.0.attn.qkv.weight": fused,
        "detector.backbone.language_backbone.encoder.text_projection": torch.arange(6.0).view(2, 3),
    }
    found, _ = to_hf(state)
    assert found["vision_encoder.backbone.embeddings.position_embeddings"].flatten().tolist() == [1, 2, 3, 4]
    thirds = [found[f"vision_encoder.backbone.layers.0.attention.{p}_proj.weight"][:, 0].tolist() for p in "qkv"]
    assert thirds == [[0, 1], [2, 3], [4, 5]]
    assert found["text_encoder.text_projection.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_what_sam3_pt_has_besides_is_left_over_not_guessed():
    besides = [
        "tracker.no_mem_embed",
        "detector.backbone.vision_backbone.sam2_convs.0.conv_1x1.weight",
        "detector.backbone.vision_backbone.trunk.blocks.0.attn.freqs_cis",
        "detector.geometry_encoder.points_direct_project.weight",
        "detector.backbone.vision_backbone.trunk.model.backbone.model.blocks.0.norm1.weight",  # a student's
    ]
    found, left = to_hf(dict.fromkeys(besides, torch.zeros(3)))
    assert found == {} and left == besides


def test_an_indivisible_third_is_named():
    with pytest.raises(UserError, match="does not split"):
        to_hf({"detector.backbone.vision_backbone.trunk.blocks.0.attn.qkv.bias": torch.zeros(4)})
