"""Translation of original SAM, MobileSAM and EdgeSAM names to those of ``SamModel`` and ``MobileSamModel``.

The original files are ``sam_vit_*.pth``, ``mobile_sam.pt`` and ``edge_sam.pth``. The table has rows of (original, ours)
prefixes. ``{i}`` and ``{j}`` match numbers, and the part after a prefix is kept. No value changes, because the image
encoder's attention is fused in both layouts. The random Fourier features are one tensor in the original and two equal
ones here, for the image and for the prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .files import TensorInfo
from .rename_trunks import TINY_VIT, rep_vit

_ENCODER, _VISION, _TRUNK = "image_encoder.", "vision_encoder.", "vision_encoder.trunk.backbone."
_DECODER, _TWO_WAY = "mask_decoder.", "mask_decoder.transformer.layers.{i}."
_FOURIER = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
FOURIER_HERE = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")

PROMPTS = [
    *((f"prompt_encoder.mask_downscaling.{n}.", f"prompt_encoder.mask_embed.{ours}.")
      for n, ours in ((0, "conv1"), (1, "layer_norm1"), (3, "conv2"), (4, "layer_norm2"), (6, "conv3"))),
    ("prompt_encoder.point_embeddings.{i}.", "prompt_encoder.point_embed.{i}."),
    ("prompt_encoder.not_a_point_embed.", "prompt_encoder.not_a_point_embed."),
    ("prompt_encoder.no_mask_embed.", "prompt_encoder.no_mask_embed."),
]  # fmt: skip
MASKS = [
    (f"{_TWO_WAY}norm{{j}}.", f"{_TWO_WAY}layer_norm{{j}}."),
    *((f"{_TWO_WAY}{name}.", f"{_TWO_WAY}{name}.")
      for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token", "mlp")),
    (f"{_DECODER}transformer.norm_final_attn.", f"{_DECODER}transformer.layer_norm_final_attn."),
    *((f"{_DECODER}{name}.", f"{_DECODER}{name}.")
      for name in ("transformer.final_attn_token_to_image", "iou_token", "mask_tokens")),
    *((f"{_DECODER}output_upscaling.{n}.", f"{_DECODER}{ours}.")
      for n, ours in ((0, "upscale_conv1"), (1, "upscale_layer_norm"), (3, "upscale_conv2"))),
    *((f"{_DECODER}{head}.layers.{n}.", f"{_DECODER}{head}.{ours}.")
      for head in ("output_hypernetworks_mlps.{i}", "iou_prediction_head")
      for n, ours in ((0, "proj_in"), (1, "layers.0"), (2, "proj_out"))),
]  # fmt: skip
_NECK = [
    (f"{_ENCODER}neck.{n}.", f"{_VISION}neck.{ours}.")
    for n, ours in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2"))
]
_VIT = [
    (f"{_ENCODER}pos_embed", f"{_VISION}pos_embed"),
    (f"{_ENCODER}patch_embed.proj.", f"{_VISION}patch_embed.projection."),
    (f"{_ENCODER}blocks.{{i}}.norm{{j}}.", f"{_VISION}layers.{{i}}.layer_norm{{j}}."),
    (f"{_ENCODER}blocks.{{i}}.attn.", f"{_VISION}layers.{{i}}.attn."),
    (f"{_ENCODER}blocks.{{i}}.mlp.", f"{_VISION}layers.{{i}}.mlp."),
]
_TINY_VIT = [(f"{_ENCODER}{there}", f"{_TRUNK}{here}") for there, here in TINY_VIT]
_EDGE_SAM = [
    *((f"{_ENCODER}{there}", f"{_TRUNK}{here}") for there, here in rep_vit((2, 2, 14, 2))),
    (f"{_ENCODER}fuse_stage2.", f"{_VISION}trunk.fine."),
    (f"{_ENCODER}fuse_stage3.op_list.0.", f"{_VISION}trunk.coarse."),
]

TABLE: tuple[tuple[str, str], ...] = (*PROMPTS, *MASKS, *_NECK, *_VIT, *_TINY_VIT, *_EDGE_SAM)
"""All rows, original prefix first."""

_IGNORED = re.compile(
    rf"^{re.escape(_ENCODER)}(norm_head\.|head\.|layers\.\d+\.blocks\.\d+\.attn\.attention_bias_idxs$)"
)
SAM, MOBILE_SAM, EDGE_SAM = "sam", "mobile_sam", "edge_sam"
_ANCHORS = {
    SAM: f"{_ENCODER}blocks.0.attn.qkv.weight", MOBILE_SAM: f"{_ENCODER}layers.0.blocks.0.conv1.c.weight",
    EDGE_SAM: f"{_ENCODER}fuse_stage2.weight",
}  # fmt: skip
TITLES = {SAM: "SAM", MOBILE_SAM: "MobileSAM", EDGE_SAM: "EdgeSAM"}
MOBILE: dict[str, dict[str, str]] = {MOBILE_SAM: {}, EDGE_SAM: {"backbone": "repvit_m1", "neck": "summed"}}
"""Fields of the ``MobileSamConfig`` of an original file by its layout."""


def compile_row(source: str, target: str) -> tuple[re.Pattern[str], str]:
    """Compile a row of a table to a pattern of names and the format string of the translated name."""
    pattern = re.sub(r"\\\{([ij])\\\}", r"(?P<\1>\\d+)", re.escape(source))
    return re.compile(f"^{pattern}(?P<rest>{'[^.].*' if source.endswith('.') else ''})$"), target + "{rest}"


_TO_OURS = [compile_row(there, here) for there, here in TABLE]


def translate(name: str, rows: list[tuple[re.Pattern[str], str]]) -> str | None:
    """Return the translation of ``name`` by the first row that matches, or None."""
    for pattern, target in rows:
        found = pattern.match(name)
        if found:
            return target.format(**found.groupdict())
    return None


def layout(names: Mapping[str, Any]) -> str | None:
    """Return ``sam``, ``mobile_sam`` or ``edge_sam`` by the names in an original file, or None for any other file."""
    return next((kind for kind, anchor in _ANCHORS.items() if anchor in names), None)


def our_names(original: str) -> tuple[str, ...] | None:
    """Return our names of an original name, or None for an unknown name.

    The result has one name, two for the Fourier features, or none for a tensor that is not used. Tensors that are not
    used are TinyViT's classifier, which MobileSAM's file contains, and the indices of its attention biases, which
    follow from the architecture.
    """
    if original == _FOURIER:
        return FOURIER_HERE
    if _IGNORED.match(original):
        return ()
    name = translate(original, _TO_OURS)
    return None if name is None else (name,)


def to_ours(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename original tensors. Tensors that are not used are dropped.

    Returns:
        The renamed tensors, and the unknown names.
    """
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name in state:
        targets = our_names(name)
        if targets is None:
            unknown.append(name)
        else:
            renamed |= dict.fromkeys(targets, state[name]) if targets else {}
    return renamed, unknown


def sam_settings(info: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Derive the fields of a ``SamConfig`` from the tensor shapes of an original SAM.

    Blocks whose table of relative positions spans the whole grid use global attention. The number of heads in the
    decoder is not set, because the original code's constant, eight, is transformers' default.

    Args:
        info: Shape and dtype of each tensor by original name.

    Raises:
        KeyError, IndexError: A tensor is missing.
        ValueError: A tensor has an unexpected number of axes.
    """

    def shape(name: str) -> tuple[int, ...]:
        return info[name].shape

    width, _, patch, _ = shape(f"{_ENCODER}patch_embed.proj.weight")
    _, grid, _, _ = shape(f"{_ENCODER}pos_embed")
    tables = []
    while f"{_ENCODER}blocks.{len(tables)}.attn.rel_pos_h" in info:
        tables.append(shape(f"{_ENCODER}blocks.{len(tables)}.attn.rel_pos_h"))
    whole = [index for index, (length, _) in enumerate(tables) if length == 2 * grid - 1]
    windows = {(length + 1) // 2 for length, _ in tables} - {grid}
    sizes = {"image_size": grid * patch, "patch_size": patch}
    _, tokens = shape(f"{_DECODER}iou_token.weight")
    return {
        "vision_config": {
            **sizes, "hidden_size": width, "num_hidden_layers": len(tables),
            "num_attention_heads": width // tables[0][1], "window_size": max(windows, default=grid),
            "global_attn_indexes": whole, "mlp_dim": shape(f"{_ENCODER}blocks.0.mlp.lin1.weight")[0],
            "output_channels": tokens, "num_pos_feats": shape(_FOURIER)[1],
        },
        "prompt_encoder_config": {
            **sizes, "hidden_size": tokens,
            "mask_input_channels": shape("prompt_encoder.mask_downscaling.3.weight")[0],
        },
        # The two-way transformer of the original code has torch's epsilon, 1e-5. transformers' default is 1e-6.
        "mask_decoder_config": {
            "hidden_size": tokens, "mlp_dim": shape(f"{_DECODER}transformer.layers.0.mlp.lin1.weight")[0],
            "iou_head_hidden_dim": shape(f"{_DECODER}iou_prediction_head.layers.0.weight")[0], "layer_norm_eps": 1e-5,
        },
    }  # fmt: skip
