"""Translation of the names in EfficientSAM3's files to ours and back: nine image trunks, and MobileCLIP text encoders.

A student's names are those of EfficientSAM3's student modules, without what a merged file has before them. Of a trunk,
no value differs. Of a text encoder, query, key and value are one fused tensor there, and the matrix of MobileCLIP's own
projection is transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from ..types import UserError
from .rename_sam import compile_row, translate
from .rename_trunks import EFFICIENT_VIT, TINY_VIT, Rows, rep_vit

_BACKBONE, _HERE, _HEAD = "backbone.model.", "backbone.", "head."
_DEEPEST = f"{_HEAD}0.weight"
"""Weight of the head's first convolution. Its inputs are the channels of the trunk's deepest map."""
_FAMILIES = {
    "EfficientViT": f"{_BACKBONE}input_stem.op_list.0.conv.weight",
    "RepViT": f"{_BACKBONE}features.0.0.c.weight",
    "TinyViT": f"{_BACKBONE}patch_embed.seq.0.c.weight",
}
"""A tensor of each family, which no other one has."""


@dataclass(frozen=True)
class PublishedTrunk:
    """A trunk with a published name.

    Attributes:
        backbone: timm name.
        family: ``EfficientViT``, ``RepViT`` or ``TinyViT``.
        channels: Channels of its deepest map, which tell the trunks of a family apart.
        rows: Prefixes of its names: EfficientSAM3's, and timm's.
        stem: timm's first convolution, which reads the image, and its batch norm.
    """

    backbone: str
    family: str
    channels: int
    rows: Rows
    stem: tuple[str, str]

    @cached_property
    def _to_ours(self) -> list[tuple[re.Pattern[str], str]]:
        return [compile_row(_BACKBONE + there, _HERE + here) for there, here in self.rows] + [compile_row(_HEAD, _HEAD)]

    @cached_property
    def _to_theirs(self) -> list[tuple[re.Pattern[str], str]]:
        return [compile_row(_HERE + here, _BACKBONE + there) for there, here in self.rows] + [compile_row(_HEAD, _HEAD)]

    def our_name(self, name: str) -> str | None:
        """Return the name in a ``StudentTrunk``, or None for an unknown name."""
        return translate(name, self._to_ours)

    def their_name(self, name: str) -> str | None:
        """Return the name in EfficientSAM3's student of a name in a ``StudentTrunk``, or None for an unknown name."""
        return translate(name, self._to_theirs)


def _trunks() -> dict[str, PublishedTrunk]:
    stems = {"EfficientViT": ("stem_in_conv.conv", "stem_in_conv.norm"), "RepViT": ("stem.conv1.c", "stem.conv1.bn"),
             "TinyViT": ("patch_embed.conv1.conv", "patch_embed.conv1.bn")}  # fmt: skip
    table = [
        ("efficientvit_b0", "EfficientViT", 128, EFFICIENT_VIT),
        ("efficientvit_b1", "EfficientViT", 256, EFFICIENT_VIT),
        ("efficientvit_b2", "EfficientViT", 384, EFFICIENT_VIT),
        ("repvit_m0_9", "RepViT", 384, rep_vit((2, 2, 14, 2))),
        ("repvit_m1_1", "RepViT", 512, rep_vit((2, 2, 12, 2))),
        ("repvit_m2_3", "RepViT", 640, rep_vit((6, 6, 34, 2))),
        ("tiny_vit_5m_224", "TinyViT", 320, TINY_VIT),
        ("tiny_vit_11m_224", "TinyViT", 448, TINY_VIT),
        ("tiny_vit_21m_224", "TinyViT", 576, TINY_VIT),
    ]
    return {row[0]: PublishedTrunk(*row, stem=stems[row[1]]) for row in table}


TRUNKS = _trunks()
"""EfficientSAM3's trunks by timm name."""


def find_trunk(state: Mapping[str, Any], where: object) -> PublishedTrunk | None:
    """Return the trunk whose tensors have EfficientSAM3's names, or None if no tensor has the names of a trunk.

    Args:
        state: Tensors, or their shapes and dtypes, by their names in EfficientSAM3's student.
        where: Name of the file in error messages.

    Raises:
        UserError: The names are those of a trunk that is not in the table.
    """
    family = next((family for family, anchor in _FAMILIES.items() if anchor in state), None)
    if family is None:
        return None
    what = f"{'an' if family.startswith('E') else 'a'} {family}"
    known = {trunk.channels: trunk for trunk in TRUNKS.values() if trunk.family == family}
    if _DEEPEST not in state or len(state[_DEEPEST].shape) != 4:
        raise UserError(
            f"{where}: {what} of EfficientSAM3 without its head ({_DEEPEST}), so it is not a complete student"
        )
    channels = state[_DEEPEST].shape[1]
    if channels not in known:
        raise UserError(
            f"{where}: an unknown trunk of EfficientSAM3: {what} whose deepest map has {channels} channels; known: "
            f"{', '.join(f'{trunk.backbone} ({n})' for n, trunk in known.items())}"
        )
    return known[channels]


# Rows of (EfficientSAM3's, transformers') names of a text encoder, in the notation of ``rename``: {p} is q, k or v of a
# fused tensor. Names of the first two lists are complete, and others are prefixes.
_LAYER, _LAYER_HERE = "encoder.transformer.{i}.", "text_encoder.layers.{i}."
TEXT_PROJECTION = ("encoder.projection_layer", "text_encoder.projection.weight")
"""MobileCLIP's own projection, which no output of SAM 3 reads. It is transposed."""
TEXT_WHOLE: Rows = [
    TEXT_PROJECTION,
    ("encoder.positional_embedding.pos_embed.pos_embed",
     "text_encoder.embeddings.position_embedding.position_embedding"),
    (f"{_LAYER}layer_scale", f"{_LAYER_HERE}layer_scale"),
    (f"{_LAYER}token_mixer.layer_scale", f"{_LAYER_HERE}token_mixer.layer_scale"),
]  # fmt: skip
TEXT_FUSED: Rows = [(f"{_LAYER}pre_norm_mha.1.qkv_proj.", f"{_LAYER_HERE}self_attn.{{p}}_proj.")]
TEXT_MODULES: Rows = [
    ("encoder.embedding_layer.", "text_encoder.embeddings.token_embedding."),
    ("encoder.final_layer_norm.", "text_encoder.final_layer_norm."),
    ("projector.", "text_projection."),
    *((f"{_LAYER}{there}.", f"{_LAYER_HERE}{here}.") for there, here in (
        ("pre_norm_mha.0", "layer_norm1"), ("pre_norm_mha.1.out_proj", "self_attn.out_proj"),
        ("pre_norm_ffn.0", "layer_norm2"), ("pre_norm_ffn.1", "mlp.fc1"), ("pre_norm_ffn.4", "mlp.fc2"),
        ("token_mixer.norm.rbr_skip", "token_mixer.reference_batchnorm"),
        ("token_mixer.mixer.rbr_skip", "token_mixer.mixer.batchnorm_skip"),
        ("token_mixer.mixer.rbr_conv.0.conv", "token_mixer.mixer.conv"),
        ("token_mixer.mixer.rbr_conv.0.bn", "token_mixer.mixer.batchnorm_conv"),
        ("convffn.conv.conv", "conv_feed_forward.depthwise_conv"),
        ("convffn.conv.bn", "conv_feed_forward.depthwise_batchnorm"),
        ("convffn.fc1", "conv_feed_forward.mlp.fc1"), ("convffn.fc2", "conv_feed_forward.mlp.fc2"),
    )),
]  # fmt: skip
TEXT_ANCHOR = "encoder.embedding_layer.weight"
"""A tensor that SAM 3's own text encoder does not have under this name."""


@cache
def _text_rows() -> list[tuple[re.Pattern[str], str]]:
    split = [(there, here.replace("{p}", part)) for there, here in TEXT_FUSED for part in "qkv"]
    return [compile_row(here, there) for there, here in (*TEXT_WHOLE, *split, *TEXT_MODULES)]


def text_to_theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a ``TextStudent`` to those of EfficientSAM3's text student.

    Raises:
        UserError: A name is unknown, or one of query, key and value is missing.
    """
    renamed: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        target = translate(name, _text_rows())
        if target is None:
            raise UserError(f"{name}: EfficientSAM3 has no name for this tensor of a text encoder")
        if part := re.search(r"self_attn\.([qkv])_proj\.", name):
            fused.setdefault(target, {})[part[1]] = value
        else:
            renamed[target] = value.T.contiguous() if name == TEXT_PROJECTION[1] else value
    for target, parts in fused.items():
        if missing := sorted(set("qkv") - parts.keys()):
            raise UserError(f"{target}: its {missing[0]} is missing")
        renamed[target] = torch.cat([parts[part] for part in "qkv"])
    return renamed
