"""Translation of the detector's names in the original ``sam3.pt`` into those of transformers' ``Sam3Model``.

A small text encoder, which EfficientSAM3's files have in the place of SAM 3's own, gets the names of a
``Sam3LiteTextModel``. The table has rows of (original, transformers) prefixes. ``{i}`` matches a number, and the part
after a prefix is kept.
Three kinds of values differ besides the names: the original position embedding starts with a class token, text
projections are transposed, and every attention stores query, key and value in one fused tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..types import UserError
from .layout import DETECTOR
from .rename_efficientsam3 import TEXT_FUSED, TEXT_MODULES, TEXT_PROJECTION, TEXT_WHOLE

_TRUNK, _VIT = "backbone.vision_backbone.trunk.", "vision_encoder.backbone."
_CONVS, _NECK = "backbone.vision_backbone.convs.", "vision_encoder.neck.fpn_layers."
_LANGUAGE, _TEXT = "backbone.language_backbone.encoder.", "text_encoder."
_BLOCK, _TEXT_LAYER = f"{_LANGUAGE}transformer.resblocks.{{i}}.", f"{_TEXT}text_model.encoder.layers.{{i}}."
_SMALL = "backbone.language_backbone."
_PARTS = ("q", "k", "v")

# These rows are complete names, not prefixes. Positions and projections also change the value.
_POSITIONS = (f"{_TRUNK}pos_embed", f"{_VIT}embeddings.position_embeddings")
_PROJECTION = (f"{_LANGUAGE}text_projection", f"{_TEXT}text_projection.weight")
_WHOLE = (_POSITIONS, _PROJECTION,
          (f"{_LANGUAGE}positional_embedding", f"{_TEXT}text_model.embeddings.position_embedding.weight"),
          *((_SMALL + original, ours) for original, ours in TEXT_WHOLE))  # fmt: skip
_TRANSPOSED = (_PROJECTION[0], _SMALL + TEXT_PROJECTION[0])

_MODULES = [
    (f"{_TRUNK}patch_embed.proj.", f"{_VIT}embeddings.patch_embeddings.projection."),
    (f"{_TRUNK}ln_pre.", f"{_VIT}layer_norm."),
    (f"{_TRUNK}blocks.{{i}}.norm1.", f"{_VIT}layers.{{i}}.layer_norm1."),
    (f"{_TRUNK}blocks.{{i}}.norm2.", f"{_VIT}layers.{{i}}.layer_norm2."),
    (f"{_TRUNK}blocks.{{i}}.attn.proj.", f"{_VIT}layers.{{i}}.attention.o_proj."),
    (f"{_TRUNK}blocks.{{i}}.mlp.", f"{_VIT}layers.{{i}}.mlp."),
    (f"{_CONVS}0.dconv_2x2_0.", f"{_NECK}0.scale_layers.0."),
    (f"{_CONVS}0.dconv_2x2_1.", f"{_NECK}0.scale_layers.2."),
    (f"{_CONVS}1.dconv_2x2.", f"{_NECK}1.scale_layers.0."),
    (f"{_CONVS}{{i}}.conv_1x1.", f"{_NECK}{{i}}.proj1."),
    (f"{_CONVS}{{i}}.conv_3x3.", f"{_NECK}{{i}}.proj2."),
    ("backbone.language_backbone.resizer.", "text_projection."),
    (f"{_LANGUAGE}token_embedding.", f"{_TEXT}text_model.embeddings.token_embedding."),
    (f"{_LANGUAGE}ln_final.", f"{_TEXT}text_model.final_layer_norm."),
    (f"{_BLOCK}attn.out_proj.", f"{_TEXT_LAYER}self_attn.out_proj."),
    (f"{_BLOCK}ln_1.", f"{_TEXT_LAYER}layer_norm1."),
    (f"{_BLOCK}ln_2.", f"{_TEXT_LAYER}layer_norm2."),
    (f"{_BLOCK}mlp.c_fc.", f"{_TEXT_LAYER}mlp.fc1."),
    (f"{_BLOCK}mlp.c_proj.", f"{_TEXT_LAYER}mlp.fc2."),
    ("geometry_encoder.encode_norm.", "geometry_encoder.output_layer_norm."),
    ("geometry_encoder.norm.", "geometry_encoder.prompt_layer_norm."),
    ("geometry_encoder.img_pre_norm.", "geometry_encoder.vision_layer_norm."),
    ("transformer.decoder.norm.", "detr_decoder.output_layer_norm."),
    ("transformer.decoder.presence_token_out_norm.", "detr_decoder.presence_layer_norm."),
    ("transformer.decoder.layers.{i}.norm1.", "detr_decoder.layers.{i}.vision_cross_attn_layer_norm."),
    ("transformer.decoder.layers.{i}.norm2.", "detr_decoder.layers.{i}.self_attn_layer_norm."),
    ("transformer.decoder.layers.{i}.norm3.", "detr_decoder.layers.{i}.mlp_layer_norm."),
    ("transformer.decoder.layers.{i}.catext_norm.", "detr_decoder.layers.{i}.text_cross_attn_layer_norm."),
    ("dot_prod_scoring.prompt_mlp.out_norm.", "dot_product_scoring.text_mlp_out_norm."),
    ("dot_prod_scoring.prompt_proj.", "dot_product_scoring.text_proj."),
    ("dot_prod_scoring.hs_proj.", "dot_product_scoring.query_proj."),
    ("segmentation_head.mask_predictor.mask_embed.", "mask_decoder.mask_embedder."),
    ("segmentation_head.instance_seg_head.", "mask_decoder.instance_projection."),
    ("segmentation_head.semantic_seg_head.", "mask_decoder.semantic_projection."),
    ("segmentation_head.cross_attn_norm.", "mask_decoder.prompt_cross_attn_norm."),
    ("segmentation_head.pixel_decoder.", "mask_decoder.pixel_decoder."),
]
_MODULES += [
    (f"{original}.linear{n}.", f"{ours}.mlp.fc{n}.")
    for original, ours in (
        ("geometry_encoder.encode.{i}", "geometry_encoder.layers.{i}"),
        ("transformer.encoder.layers.{i}", "detr_encoder.layers.{i}"),
        ("transformer.decoder.layers.{i}", "detr_decoder.layers.{i}"),
    )
    for n in (1, 2)
]
_MODULES += [
    (f"{original}.norm{n}.", f"{ours}.layer_norm{n}.")
    for original, ours in (
        ("geometry_encoder.encode.{i}", "geometry_encoder.layers.{i}"),
        ("transformer.encoder.layers.{i}", "detr_encoder.layers.{i}"),
    )
    for n in (1, 2, 3)
]
_MODULES += [  # small MLPs: layers are numbered from 0 in the original and from 1 in transformers
    (f"{original}.layers.{n}.", f"{ours}.layer{n + 1}.")
    for original, ours in (
        ("transformer.decoder.bbox_embed", "detr_decoder.box_head"),
        ("transformer.decoder.presence_token_head", "detr_decoder.presence_head"),
        ("transformer.decoder.ref_point_head", "detr_decoder.ref_point_head"),
        ("transformer.decoder.boxRPB_embed_x", "detr_decoder.box_rpb_embed_x"),
        ("transformer.decoder.boxRPB_embed_y", "detr_decoder.box_rpb_embed_y"),
        ("dot_prod_scoring.prompt_mlp", "dot_product_scoring.text_mlp"),
    )
    for n in (0, 1, 2)
]
_MODULES += [
    (f"geometry_encoder.{name}.", f"geometry_encoder.{name}.")
    for name in ("label_embed", "cls_embed", "boxes_direct_project", "boxes_pool_project", "boxes_pos_enc_project",
                 "final_proj")
]  # fmt: skip
_MODULES += [
    (f"transformer.decoder.{name}.", f"detr_decoder.{name}.")
    for name in ("query_embed", "reference_points", "presence_token")
]

# torch.nn.MultiheadAttention in the original: fused in_proj_weight and in_proj_bias, and an output projection
_ATTENTIONS = [
    ("geometry_encoder.encode.{i}.self_attn", "geometry_encoder.layers.{i}.self_attn"),
    ("geometry_encoder.encode.{i}.cross_attn_image", "geometry_encoder.layers.{i}.cross_attn"),
    ("transformer.encoder.layers.{i}.self_attn", "detr_encoder.layers.{i}.self_attn"),
    ("transformer.encoder.layers.{i}.cross_attn_image", "detr_encoder.layers.{i}.cross_attn"),
    ("transformer.decoder.layers.{i}.self_attn", "detr_decoder.layers.{i}.self_attn"),
    ("transformer.decoder.layers.{i}.cross_attn", "detr_decoder.layers.{i}.vision_cross_attn"),
    ("transformer.decoder.layers.{i}.ca_text", "detr_decoder.layers.{i}.text_cross_attn"),
    ("segmentation_head.cross_attend_prompt", "mask_decoder.prompt_cross_attn"),
]
_MODULES += [(f"{original}.out_proj.", f"{ours}.o_proj.") for original, ours in _ATTENTIONS]
_MODULES += [(_SMALL + original, ours) for original, ours in TEXT_MODULES]
# Rows are the prefix of the fused tensor and the prefix of each third, where {p} is q, k or v.
_FUSED = [
    (f"{_TRUNK}blocks.{{i}}.attn.qkv.", f"{_VIT}layers.{{i}}.attention.{{p}}_proj."),
    (f"{_BLOCK}attn.in_proj_", f"{_TEXT_LAYER}self_attn.{{p}}_proj."),
    *((f"{original}.in_proj_", f"{ours}.{{p}}_proj.") for original, ours in _ATTENTIONS),
    *((_SMALL + original, ours) for original, ours in TEXT_FUSED),
]
TABLE: tuple[tuple[str, str], ...] = (*_WHOLE, *_FUSED, *_MODULES)
"""All rows, original prefix first."""


def _compile(original: str, whole: bool) -> re.Pattern[str]:
    pattern = re.escape(original).replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(f"^{pattern}(?P<rest>{'' if whole else '[^.].*'})$")


_TO_HF = [(_compile(original, (original, ours) in _WHOLE), ours) for original, ours in TABLE]


def hf_names(original: str) -> tuple[str, ...]:
    """Return the ``Sam3Model`` names of an original name.

    The result has one name, three names (q, k, v) for a fused tensor, or none for an unknown name.
    """
    for pattern, target in _TO_HF:
        if found := pattern.match(original.removeprefix(DETECTOR)):
            begin, rest = target.replace("{i}", found.groupdict().get("i", "")), found["rest"]
            return tuple(begin.replace("{p}", part) + rest for part in (_PARTS if "{p}" in begin else ("",)))
    return ()


def to_hf(state: Mapping[str, Tensor], names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Rename original tensors for ``Sam3Model``.

    The results are views where the value does not change.

    Args:
        state: Tensors by original name, with or without ``detector.``.
        names: The names to translate. None translates all. A lazily read checkpoint reads only these tensors.

    Returns:
        The renamed tensors, and the original names without a counterpart. In a published file these are the tracker's,
        the ``freqs_cis`` buffers (recomputed by transformers) and the geometry encoder's ``points_*``.

    Raises:
        UserError: A fused tensor does not split into three, or the position embedding has an unexpected shape.
    """
    renamed: dict[str, Tensor] = {}
    left: list[str] = []
    for name in state if names is None else names:
        targets = hf_names(name)
        if not targets:
            left.append(name)
            continue
        value = state[name]
        bare = name.removeprefix(DETECTOR)
        if bare == _POSITIONS[0]:
            value = without_class_token(value, name)
        elif bare in _TRANSPOSED:
            value = value.T.contiguous()
        if len(targets) == 3 and (value.ndim == 0 or value.shape[0] % 3):
            raise UserError(f"{name}: shape {tuple(value.shape)} does not split into query, key and value")
        renamed.update(zip(targets, value.chunk(3) if len(targets) == 3 else (value,), strict=True))
    return renamed, left


def without_class_token(positions: Tensor, name: str) -> Tensor:
    """Remove the class token's row from a position embedding: (1, 1 + n, c) to (1, n, c), where n is a square number.

    A table without this row is returned unchanged. Raises ``UserError`` unless the table has three axes.
    """
    if positions.ndim != 3:
        raise UserError(
            f"{name}: shape {tuple(positions.shape)} is not that of a position embedding (1, patches, channels)"
        )
    patches = positions.shape[1]
    if round((patches - 1) ** 0.5) ** 2 == patches - 1:
        return positions[:, 1:]
    return positions
