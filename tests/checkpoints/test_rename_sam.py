"""Both tables against the full original key lists, written down here from the architectures, and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from original_names import sam_to_original as to_original
from published_names import Shapes, affine, edge_sam, neck, tiny_vit
from transformers import SamConfig, SamModel

from samdistill.checkpoints.files import TensorInfo
from samdistill.checkpoints.rename_sam import layout, our_names, sam_settings, to_ours
from samdistill.students import MobileSamConfig, MobileSamModel

SIZES = {  # width, depth, heads, global blocks, tensors in the published file
    "vit_b": (768, 12, 12, (2, 5, 8, 11), 314),
    "vit_l": (1024, 24, 16, (5, 11, 17, 23), 482),
    "vit_h": (1280, 32, 16, (7, 15, 23, 31), 594),
}


def heads(c: int = 256, mlp: int = 2048) -> Shapes:
    """Prompt encoder and mask decoder."""
    at, found = "prompt_encoder", dict[str, tuple[int, ...]]()
    found[f"{at}.pe_layer.positional_encoding_gaussian_matrix"] = (2, c // 2)
    for name in (*(f"point_embeddings.{i}" for i in range(4)), "not_a_point_embed", "no_mask_embed"):
        found[f"{at}.{name}.weight"] = (1, c)
    found |= affine(f"{at}.mask_downscaling.0", 4, 1, 2, 2) | affine(f"{at}.mask_downscaling.1", 4)
    found |= affine(f"{at}.mask_downscaling.3", 16, 4, 2, 2) | affine(f"{at}.mask_downscaling.4", 16)
    found |= affine(f"{at}.mask_downscaling.6", c, 16, 1, 1)
    at = "mask_decoder"
    found |= {f"{at}.iou_token.weight": (1, c), f"{at}.mask_tokens.weight": (4, c)}
    attentions = {f"layers.{i}.self_attn": c for i in range(2)} | {"final_attn_token_to_image": c // 2}
    for i, way in itertools.product(range(2), ("token_to_image", "image_to_token")):
        attentions[f"layers.{i}.cross_attn_{way}"] = c // 2
    for name, inner in attentions.items():
        for part in "qkv":
            found |= affine(f"{at}.transformer.{name}.{part}_proj", inner, c)
        found |= affine(f"{at}.transformer.{name}.out_proj", c, inner)
    for i in range(2):
        for norm in range(1, 5):
            found |= affine(f"{at}.transformer.layers.{i}.norm{norm}", c)
        found |= affine(f"{at}.transformer.layers.{i}.mlp.lin1", mlp, c)
        found |= affine(f"{at}.transformer.layers.{i}.mlp.lin2", c, mlp)
    found |= affine(f"{at}.transformer.norm_final_attn", c) | affine(f"{at}.output_upscaling.1", c // 4)
    for number, (inputs, outputs) in {0: (c, c // 4), 3: (c // 4, c // 8)}.items():  # transposed: inputs first
        name = f"{at}.output_upscaling.{number}"
        found |= {f"{name}.weight": (inputs, outputs, 2, 2), f"{name}.bias": (outputs,)}
    outputs_of = {f"output_hypernetworks_mlps.{i}": c // 8 for i in range(4)} | {"iou_prediction_head": 4}
    for name, out in outputs_of.items():
        for number, outputs in enumerate((c, c, out)):
            found |= affine(f"{at}.{name}.layers.{number}", outputs, c)
    return found


def vit(width: int, depth: int, count: int, whole: tuple[int, ...], grid: int = 64, window: int = 14, c: int = 256):
    at = "image_encoder"
    found = {f"{at}.pos_embed": (1, grid, grid, width)} | affine(f"{at}.patch_embed.proj", width, 3, 16, 16)
    for i in range(depth):
        block, span = f"{at}.blocks.{i}", 2 * (grid if i in whole else window) - 1
        found |= affine(f"{block}.norm1", width) | affine(f"{block}.norm2", width)
        found |= {f"{block}.attn.rel_pos_{axis}": (span, width // count) for axis in "hw"}
        found |= affine(f"{block}.attn.qkv", 3 * width, width) | affine(f"{block}.attn.proj", width, width)
        found |= affine(f"{block}.mlp.lin1", 4 * width, width) | affine(f"{block}.mlp.lin2", width, 4 * width)
    return found | neck(width, c)


def on_meta(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_of_a_sam_has_its_place_and_shape(size):
    width, depth, count, whole, tensors = SIZES[size]
    original = vit(width, depth, count, whole) | heads()
    assert len(original) == tensors and layout(original) == "sam"
    settings = sam_settings({name: TensorInfo(shape, torch.float32) for name, shape in original.items()})
    vision = settings["vision_config"]
    found = [vision[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "window_size")]
    assert found == [width, depth, count, 14] and tuple(vision["global_attn_indexes"]) == whole
    renamed, unknown = to_ours(on_meta(original))
    with torch.device("meta"):
        wanted = SamModel(SamConfig(**settings)).state_dict()
    assert not unknown
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in wanted.items()}
    back, left = to_original(wanted)
    assert not left and {k: tuple(v.shape) for k, v in back.items()} == original


def mobile_sam() -> Shapes:
    at, own = "image_encoder", tiny_vit()
    classifier = affine(f"{at}.norm_head", 320) | affine(f"{at}.head", 1000, 320)
    return {f"{at}.{name}": shape for name, shape in own.items()} | classifier | neck(320, 256)


def test_every_tensor_of_mobile_sam_has_its_place_and_shape():
    original = mobile_sam() | heads()
    assert len(original) == 439 and layout(original) == "mobile_sam"
    renamed, unknown = to_ours(on_meta(original))
    with torch.device("meta"):
        wanted = MobileSamModel(MobileSamConfig()).state_dict()
    assert not unknown
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in wanted.items()}
    back, left = to_original(wanted)
    spare = {name for name in original if name.startswith(("image_encoder.norm_head.", "image_encoder.head."))}
    assert not left and len(spare) == 4
    assert {k: tuple(v.shape) for k, v in back.items()} == {k: s for k, s in original.items() if k not in spare}


def test_every_tensor_of_edge_sam_has_its_place_and_shape():
    original = edge_sam() | heads()
    assert len(original) == 821 and layout(original) == "edge_sam"
    renamed, unknown = to_ours(on_meta(original))
    with torch.device("meta"):
        wanted = MobileSamModel(MobileSamConfig(backbone="repvit_m1", neck="summed")).state_dict()
    assert not unknown
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in wanted.items()}
    back, left = to_original(wanted)
    assert not left and {k: tuple(v.shape) for k, v in back.items()} == original


TINY = "vision_encoder.trunk.backbone."
PAIRS = {  # names whose shape alone would not tell them apart
    "image_encoder.blocks.7.norm2.bias": "vision_encoder.layers.7.layer_norm2.bias",
    "image_encoder.blocks.11.attn.rel_pos_w": "vision_encoder.layers.11.attn.rel_pos_w",
    "image_encoder.neck.1.weight": "vision_encoder.neck.layer_norm1.weight",
    "image_encoder.neck.3.weight": "vision_encoder.neck.layer_norm2.weight",
    "prompt_encoder.point_embeddings.2.weight": "prompt_encoder.point_embed.2.weight",
    "prompt_encoder.not_a_point_embed.weight": "prompt_encoder.not_a_point_embed.weight",
    "mask_decoder.transformer.layers.1.norm3.weight": "mask_decoder.transformer.layers.1.layer_norm3.weight",
    "mask_decoder.transformer.layers.0.cross_attn_image_to_token.k_proj.bias":
        "mask_decoder.transformer.layers.0.cross_attn_image_to_token.k_proj.bias",
    "mask_decoder.transformer.norm_final_attn.bias": "mask_decoder.transformer.layer_norm_final_attn.bias",
    "mask_decoder.output_hypernetworks_mlps.3.layers.0.weight":
        "mask_decoder.output_hypernetworks_mlps.3.proj_in.weight",
    "mask_decoder.output_hypernetworks_mlps.3.layers.1.weight":
        "mask_decoder.output_hypernetworks_mlps.3.layers.0.weight",
    "mask_decoder.iou_prediction_head.layers.2.bias": "mask_decoder.iou_prediction_head.proj_out.bias",
    "image_encoder.features.24.token_mixer.0.bn.weight": f"{TINY}stages_3.downsample.spatial_downsample.bn.weight",
    "image_encoder.features.23.token_mixer.0.conv1.bn.bias":
        f"{TINY}stages_3.downsample.pre_block.token_mixer.conv1.bn.bias",
    "image_encoder.fuse_stage3.op_list.0.weight": "vision_encoder.trunk.coarse.weight",
    "image_encoder.patch_embed.seq.2.bn.running_mean": f"{TINY}patch_embed.conv2.bn.running_mean",
    "image_encoder.layers.0.blocks.1.conv2.c.weight": f"{TINY}stages_0.blocks.1.conv2.conv.weight",
    "image_encoder.layers.2.blocks.5.attn.attention_biases": f"{TINY}stages_2.blocks.5.attn.attention_biases",
    "image_encoder.layers.1.downsample.conv3.bn.bias": f"{TINY}stages_2.downsample.conv3.bn.bias",
}  # fmt: skip


@pytest.mark.parametrize("original", PAIRS)
def test_known_names(original):
    assert our_names(original) == (PAIRS[original],)


def test_the_fourier_features_are_held_twice_here():
    name = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    value = torch.randn(2, 8)
    renamed, _ = to_ours({name: value})
    assert len(renamed) == 2 and all(held is value for held in renamed.values())
    assert to_original(renamed) == ({name: value}, [])


def test_strangers_are_named_and_what_is_not_needed_is_not():
    strangers = [
        "image_encoder.blocks.0.norm5", "image_encoder.neck.4.weight", "mask_decoder.hf_token.weight", "pixel_mean",
        "mask_decoder.transformer.layers.0.adapter.weight", "image_encoder.layers.3.downsample.conv1.c.weight",
    ]  # fmt: skip
    ignored = ["image_encoder.head.weight", "image_encoder.layers.1.blocks.0.attn.attention_bias_idxs"]
    renamed, unknown = to_ours(dict.fromkeys([*strangers, *ignored], torch.zeros(2)))
    assert renamed == {} and unknown == strangers
    assert layout({"model": 1}) is None


def test_values_come_back_bit_for_bit():
    """A tiny SAM, every tensor random, through its original names and into a second model."""
    shapes = vit(24, 3, 2, (1,), grid=4, window=2, c=16) | heads(16, 32)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    model = SamModel(SamConfig(**sam_settings({name: TensorInfo.of(value) for name, value in state.items()})))
    model.load_state_dict(to_ours(state)[0], strict=True)
    back, left = to_original(model.state_dict())
    assert not left and back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
