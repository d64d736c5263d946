"""Translation of original SAM 2 names (``sam2*_hiera_*.pt``) to those of ``Sam2Model`` and ``Sam2VideoModel``.

SAM 3's tracker is that of SAM 2, so prompts, mask decoder and memory use its table (``rename_tracker``): an original
name is first written as that of a ``sam3.pt``. The image encoder, Hiera and its neck, has a table of its own here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Sam2VideoConfig

from ..types import UserError
from .files import TensorInfo
from .layout import TRACKER
from .rename_sam import compile_row, translate
from .rename_tracker import to_tracker

SAM2 = "sam2_video"
_ENCODER, _ANCHOR = "image_encoder.", "image_encoder.trunk.patch_embed.proj.weight"
_HIERA, _HIERA_HERE = f"{_ENCODER}trunk.", "vision_encoder.backbone."
_BLOCK, _BLOCK_HERE = f"{_HIERA}blocks.{{i}}.", f"{_HIERA_HERE}blocks.{{i}}."
TABLE: tuple[tuple[str, str], ...] = (
    (f"{_HIERA}pos_embed", f"{_HIERA_HERE}pos_embed"),
    (f"{_HIERA}pos_embed_window", f"{_HIERA_HERE}pos_embed_window"),
    (f"{_HIERA}patch_embed.proj.", f"{_HIERA_HERE}patch_embed.projection."),
    (f"{_BLOCK}norm{{j}}.", f"{_BLOCK_HERE}layer_norm{{j}}."),
    (f"{_BLOCK}attn.", f"{_BLOCK_HERE}attn."),
    (f"{_BLOCK}mlp.layers.0.", f"{_BLOCK_HERE}mlp.proj_in."),
    (f"{_BLOCK}mlp.layers.1.", f"{_BLOCK_HERE}mlp.proj_out."),
    (f"{_BLOCK}proj.", f"{_BLOCK_HERE}proj."),
    (f"{_ENCODER}neck.convs.{{i}}.conv.", "vision_encoder.neck.convs.{i}."),
)
"""All rows of the image encoder, original prefix first."""
_TO_HF = [compile_row(there, here) for there, here in TABLE]
_MEMORY = {"memory_attention.": f"{TRACKER}transformer.encoder.", "memory_encoder.": f"{TRACKER}maskmem_backbone."}
_TWO_WAY = "sam_mask_decoder.transformer."
_SIZES: dict[tuple[int, int], dict[str, Any]] = {
    (96, 12): {"blocks_per_stage": [1, 2, 7, 2], "global_attention_blocks": [5, 7, 9]},
    (96, 16): {"blocks_per_stage": [1, 2, 11, 2], "global_attention_blocks": [7, 10, 13]},
    (112, 24): {"blocks_per_stage": [2, 3, 16, 3], "global_attention_blocks": [12, 16, 20]},
    (144, 48): {"blocks_per_stage": [2, 6, 36, 4], "global_attention_blocks": [23, 33, 43],
                "window_size_per_stage": [8, 4, 16, 8]},
}  # fmt: skip
"""Settings that no tensor shows, of the four published sizes, by channels and blocks of the trunk."""


def is_sam2(names: Mapping[str, Any]) -> bool:
    """Whether these are the names of an original SAM 2."""
    return _ANCHOR in names


def to_sam2(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename original tensors for ``Sam2VideoModel``. A ``Sam2Model`` has the same names without the memory's.

    Returns:
        The renamed tensors, and the unknown original names.

    Raises:
        UserError: A point embedding is missing or has an unexpected shape.
    """
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name in state:
        if (here := translate(name, _TO_HF)) is not None:
            renamed[here] = state[name]
        else:
            origin[_in_sam3(name)] = name
    others, left = to_tracker({there: state[name] for there, name in origin.items()})
    return renamed | others, [origin[name] for name in left]


def _in_sam3(name: str) -> str:
    """Return the name of a SAM 2's tensor in a ``sam3.pt``."""
    begin = next((begin for begin in _MEMORY if name.startswith(begin)), None)
    if name.startswith(_TWO_WAY):
        name = name.replace(".mlp.layers.0.", ".mlp.lin1.").replace(".mlp.layers.1.", ".mlp.lin2.")
    return TRACKER + name if begin is None else _MEMORY[begin] + name.removeprefix(begin)


def sam2_config(info: Mapping[str, TensorInfo], where: object) -> Sam2VideoConfig:
    """Derive the configuration of an original SAM 2 from its tensors.

    SAM 2.1 differs from SAM 2 in two tensors of the memory. All other sizes are those of the published checkpoints.

    Args:
        info: Shape and dtype of each tensor by original name.
        where: Name of the file in error messages.

    Raises:
        UserError: The trunk is none of the four published ones.
        KeyError: A tensor is missing.
    """
    width, blocks = info[_ANCHOR].shape[0], 0
    while f"{_HIERA}blocks.{blocks}.norm1.weight" in info:
        blocks += 1
    if (width, blocks) not in _SIZES:
        raise UserError(
            f"{where}: a Hiera of {blocks} blocks and {width} channels is none of the published SAM 2 trunks; give a "
            "Hugging Face folder, whose config.json describes it"
        )
    heads, widths = (1 if width == 96 else 2), [width * 2**stage for stage in range(4)]
    trunk = {
        "model_type": "sam2_hiera_det_model", "hidden_size": width, "num_attention_heads": heads,
        "embed_dim_per_stage": widths, "num_attention_heads_per_stage": [heads * 2**stage for stage in range(4)],
        "window_positional_embedding_background_size": list(info[f"{_HIERA}pos_embed"].shape[2:]),
        **_SIZES[width, blocks],
    }  # fmt: skip
    vision = {"model_type": "sam2_vision_model", "backbone_config": trunk, "backbone_channel_list": widths[::-1]}
    return Sam2VideoConfig(
        vision_config=vision, enable_occlusion_spatial_embedding="no_obj_embed_spatial" in info,
        enable_temporal_pos_encoding_for_object_pointers="obj_ptr_tpos_proj.weight" in info,
    )  # fmt: skip
