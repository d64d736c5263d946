"""EfficientSAM3's names against lists written down from the architectures, and both ways."""

from __future__ import annotations

import published_names
import pytest
import torch

from samdistill.checkpoints.layout import ORIGINAL_TEXT
from samdistill.checkpoints.rename import to_hf
from samdistill.checkpoints.rename_efficientsam3 import TRUNKS, find_trunk, text_to_theirs
from samdistill.students import StudentTrunk, StudentTrunkConfig, TextStudent, TextStudentConfig
from samdistill.students.text import TEXT_SIZES
from samdistill.types import UserError

COUNTS = {
    "efficientvit_b0": 194, "efficientvit_b1": 269, "efficientvit_b2": 362, "repvit_m0_9": 707, "repvit_m1_1": 653,
    "repvit_m2_3": 1463, "tiny_vit_5m_224": 300, "tiny_vit_11m_224": 300, "tiny_vit_21m_224": 300,
}  # fmt: skip
"""Tensors of each published student."""
PAIRS = {  # names whose shape alone would not tell them apart
    "repvit_m1_1": {
        "backbone.model.features.0.2.bn.bias": "backbone.stem.conv2.bn.bias",
        "backbone.model.features.1.token_mixer.0.conv.c.weight": "backbone.stages_0.blocks.0.token_mixer.conv.c.weight",
        "backbone.model.features.3.token_mixer.0.bn.weight":
            "backbone.stages_1.downsample.pre_block.token_mixer.bn.weight",
        "backbone.model.features.4.token_mixer.0.c.weight":
            "backbone.stages_1.downsample.spatial_downsample.c.weight",
        "backbone.model.features.4.token_mixer.2.bn.bias":
            "backbone.stages_1.downsample.channel_downsample.bn.bias",
        "backbone.model.features.4.channel_mixer.m.2.c.weight": "backbone.stages_1.downsample.ffn.conv2.c.weight",
        "backbone.model.features.5.token_mixer.1.fc1.bias": "backbone.stages_1.blocks.0.se.fc1.bias",
        "backbone.model.features.20.channel_mixer.m.0.bn.weight":
            "backbone.stages_2.blocks.11.channel_mixer.conv1.bn.weight",
        "backbone.model.features.24.token_mixer.0.conv1.bias": "backbone.stages_3.blocks.1.token_mixer.conv1.bias",
    },
    "efficientvit_b1": {
        "backbone.model.input_stem.op_list.0.norm.weight": "backbone.stem_in_conv.norm.weight",
        "backbone.model.input_stem.op_list.1.main.depth_conv.norm.bias": "backbone.stem_res0.main.depth_conv.norm.bias",
        "backbone.model.stages.2.op_list.3.context_module.main.aggreg.0.1.weight":
            "backbone.stages_2.blocks.3.context_module.main.aggreg.0.1.weight",
        "backbone.model.stages.3.op_list.0.main.point_conv.norm.running_var":
            "backbone.stages_3.blocks.0.main.point_conv.norm.running_var",
    },
    "tiny_vit_11m_224": {
        "backbone.model.patch_embed.seq.2.c.weight": "backbone.patch_embed.conv2.conv.weight",
        "backbone.model.layers.0.blocks.1.conv3.bn.weight": "backbone.stages_0.blocks.1.conv3.bn.weight",
        "backbone.model.layers.1.downsample.conv2.c.weight": "backbone.stages_2.downsample.conv2.conv.weight",
        "backbone.model.layers.2.blocks.5.attn.attention_biases": "backbone.stages_2.blocks.5.attn.attention_biases",
        "backbone.model.layers.3.blocks.0.mlp.norm.bias": "backbone.stages_3.blocks.0.mlp.norm.bias",
        "head.3.bias": "head.3.bias",
    },
}  # fmt: skip
TEXT_PAIRS = {
    "encoder.embedding_layer.weight": "text_encoder.embeddings.token_embedding.weight",
    "encoder.transformer.2.pre_norm_mha.0.weight": "text_encoder.layers.2.layer_norm1.weight",
    "encoder.transformer.2.pre_norm_ffn.0.weight": "text_encoder.layers.2.layer_norm2.weight",
    "encoder.transformer.1.pre_norm_ffn.4.bias": "text_encoder.layers.1.mlp.fc2.bias",
    "encoder.transformer.0.token_mixer.norm.rbr_skip.bias":
        "text_encoder.layers.0.token_mixer.reference_batchnorm.bias",
    "encoder.transformer.5.token_mixer.mixer.rbr_skip.weight":
        "text_encoder.layers.5.token_mixer.mixer.batchnorm_skip.weight",
    "encoder.transformer.5.token_mixer.mixer.rbr_conv.0.bn.running_mean":
        "text_encoder.layers.5.token_mixer.mixer.batchnorm_conv.running_mean",
    "encoder.transformer.0.token_mixer.layer_scale": "text_encoder.layers.0.token_mixer.layer_scale",
    "encoder.transformer.0.convffn.conv.bn.bias": "text_encoder.layers.0.conv_feed_forward.depthwise_batchnorm.bias",
    "projector.bias": "text_projection.bias",
}  # fmt: skip


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def meta(shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("backbone", COUNTS)
def test_every_tensor_of_a_trunk_has_its_place_and_shape_both_ways(backbone) -> None:
    published = published_names.trunk(backbone)
    assert len(published) == COUNTS[backbone]
    found = find_trunk(meta(published), "file.pth")
    assert found is TRUNKS[backbone]
    with torch.device("meta"):
        own = shapes(StudentTrunk(StudentTrunkConfig(backbone=backbone, head="published")).state_dict())
    assert {found.our_name(name): shape for name, shape in published.items()} == own
    assert {found.their_name(name): shape for name, shape in own.items()} == published
    assert all(found.their_name(found.our_name(name) or "") == name for name in published)


@pytest.mark.parametrize("backbone", PAIRS)
def test_names_of_trunks_that_shapes_do_not_tell_apart(backbone) -> None:
    assert {name: TRUNKS[backbone].our_name(name) for name in PAIRS[backbone]} == PAIRS[backbone]


def test_names_that_no_trunk_has_are_not_translated() -> None:
    strange = ("backbone.model.classifier.weight", "backbone.model.features.99.token_mixer.0.c.weight", "neck.0.weight")
    assert [TRUNKS["repvit_m0_9"].our_name(name) for name in strange] == [None] * 3
    assert TRUNKS["repvit_m0_9"].their_name("backbone.stages_0.blocks.2.se.fc1.bias") is None


@pytest.mark.parametrize("size", published_names.TEXTS)
def test_every_tensor_of_a_text_encoder_has_its_place_and_shape(size) -> None:
    published = published_names.text(*published_names.TEXTS[size])
    renamed, left = to_hf({ORIGINAL_TEXT + name: value for name, value in meta(published).items()})
    with torch.device("meta"):
        config = TextStudentConfig(
            **TEXT_SIZES[size], projection_dim=TEXT_SIZES[size]["hidden_size"], max_position_embeddings=16
        )
        own = TextStudent(config).state_dict()
    assert not left and shapes(renamed) == shapes(own)
    assert shapes(text_to_theirs(own)) == published


def test_names_of_text_encoders_that_shapes_do_not_tell_apart() -> None:
    state = {ORIGINAL_TEXT + name: torch.zeros(1) for name in TEXT_PAIRS}
    assert list(to_hf(state)[0]) == list(TEXT_PAIRS.values())


def test_query_key_value_and_the_projection_keep_their_values_both_ways() -> None:
    torch.manual_seed(0)
    name = "encoder.transformer.0.pre_norm_mha.1.qkv_proj.weight"
    theirs = {name: torch.randn(12, 4), "encoder.projection_layer": torch.randn(4, 5)}
    ours, left = to_hf({ORIGINAL_TEXT + name: value for name, value in theirs.items()})
    at = "text_encoder.layers.0.self_attn"
    assert not left and torch.equal(ours[f"{at}.k_proj.weight"], theirs[name][4:8])
    assert torch.equal(ours[f"{at}.v_proj.weight"], theirs[name][8:])
    # theirs: x @ projection_layer; ours: a linear layer without bias
    x = torch.randn(3, 4)
    wanted = x @ theirs["encoder.projection_layer"]
    torch.testing.assert_close(torch.nn.functional.linear(x, ours["text_encoder.projection.weight"]), wanted)
    back = text_to_theirs(ours)
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)
    del ours[f"{at}.k_proj.weight"]
    with pytest.raises(UserError, match=r"qkv_proj\.weight: its k is missing"):
        text_to_theirs(ours)
    with pytest.raises(UserError, match="strange: EfficientSAM3 has no name for this tensor"):
        text_to_theirs({"strange": torch.zeros(1)})


def test_a_trunk_that_is_not_in_the_table_is_refused() -> None:
    published = published_names.trunk("repvit_m0_9")
    known = r"known: repvit_m0_9 \(384\), repvit_m1_1 \(512\), repvit_m2_3 \(640\)"
    with pytest.raises(UserError, match=f"f.pth: an unknown trunk of EfficientSAM3: a RepViT .* 96 channels; {known}"):
        find_trunk(meta(published | {"head.0.weight": (1024, 96, 1, 1)}), "f.pth")
    del published["head.0.weight"]
    with pytest.raises(UserError, match=r"a RepViT of EfficientSAM3 without its head \(head.0.weight\)"):
        find_trunk(meta(published), "f.pth")
    assert find_trunk({"other": torch.zeros(1)}, "f.pth") is None
