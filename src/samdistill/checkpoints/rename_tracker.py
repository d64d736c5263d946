"""Translation of the tracker's names in the original ``sam3.pt`` to those of transformers' tracker models.

The models are ``Sam3TrackerModel`` and ``Sam3TrackerVideoModel``. Only the video model has the memory. The tracker's
image encoder is stored with the detector: it shares the detector's trunk and has its own neck (``sam2_convs``). Its
prompt encoder and mask decoder are SAM's, plus an object score and two convolutions for finer maps.

The table has rows of (original, transformers) prefixes as in ``rename_sam``, which are tried in order. Two values
differ besides the names. The point embeddings, four tensors in the original, are rows of one table here. The random
Fourier features, one tensor in the original, are two equal ones here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..types import UserError
from .layout import DETECTOR, ORIGINAL_TRUNK, TRACKER
from .rename import to_hf
from .rename_sam import FOURIER_HERE, MASKS, PROMPTS, compile_row, translate

_PROMPT, _DECODER = f"{TRACKER}sam_prompt_encoder.", f"{TRACKER}sam_mask_decoder."
_TWO_WAY, _TWO_WAY_HERE = f"{_DECODER}transformer.", "mask_decoder.transformer."
_NECK, _DETECTORS_NECK = f"{DETECTOR}backbone.vision_backbone.sam2_convs.", f"{DETECTOR}backbone.vision_backbone.convs."
_FOURIER = f"{_PROMPT}pe_layer.positional_encoding_gaussian_matrix"
_POINTS, _POINTS_HERE = f"{_PROMPT}point_embeddings.", "prompt_encoder.point_embed.weight"
_ATTENTION, _ATTENTION_HERE = f"{TRACKER}transformer.encoder.layers.{{i}}.", "memory_attention.layers.{i}."
_MEMORY, _MEMORY_HERE = f"{TRACKER}maskmem_backbone.", "memory_encoder."
_THREE_LAYERS = ((0, "proj_in"), (1, "layers.0"), (2, "proj_out"))

_HEADS = [
    *((f"{_TWO_WAY}layers.{{i}}.{name}.out_proj.", f"{_TWO_WAY_HERE}layers.{{i}}.{name}.o_proj.")
      for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")),
    (f"{_TWO_WAY}final_attn_token_to_image.out_proj.", f"{_TWO_WAY_HERE}final_attn_token_to_image.o_proj."),
    (f"{_TWO_WAY}layers.{{i}}.mlp.lin1.", f"{_TWO_WAY_HERE}layers.{{i}}.mlp.proj_in."),
    (f"{_TWO_WAY}layers.{{i}}.mlp.lin2.", f"{_TWO_WAY_HERE}layers.{{i}}.mlp.proj_out."),
    (f"{_DECODER}obj_score_token.", "mask_decoder.obj_score_token."),
    (f"{_DECODER}conv_s{{i}}.", "mask_decoder.conv_s{i}."),
    *((f"{_DECODER}pred_obj_score_head.layers.{n}.", f"mask_decoder.pred_obj_score_head.{here}.")
      for n, here in _THREE_LAYERS),
    *((f"{TRACKER}sam_{there}", here) for there, here in (*PROMPTS, *MASKS)),
    (f"{TRACKER}no_mem_embed", "no_memory_embedding"),
]  # fmt: skip
_VIDEO = [
    (f"{TRACKER}maskmem_tpos_enc", "memory_temporal_positional_encoding"),
    (f"{TRACKER}no_mem_pos_enc", "no_memory_positional_encoding"),
    (f"{TRACKER}no_obj_ptr", "no_object_pointer"),
    (f"{TRACKER}no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
    (f"{TRACKER}mask_downsample.", "mask_downsample."),
    (f"{TRACKER}obj_ptr_tpos_proj.", "temporal_positional_encoding_projection_layer."),
    *((f"{TRACKER}obj_ptr_proj.layers.{n}.", f"object_pointer_proj.{here}.") for n, here in _THREE_LAYERS),
    *((f"{_ATTENTION}{name}.out_proj.", f"{_ATTENTION_HERE}{name}.o_proj.")
      for name in ("self_attn", "cross_attn_image")),
    *((f"{_ATTENTION}{name}.", f"{_ATTENTION_HERE}{name}.") for name in ("self_attn", "cross_attn_image")),
    (f"{_ATTENTION}linear{{j}}.", f"{_ATTENTION_HERE}linear{{j}}."),
    (f"{_ATTENTION}norm{{j}}.", f"{_ATTENTION_HERE}layer_norm{{j}}."),
    (f"{TRACKER}transformer.encoder.norm.", "memory_attention.layer_norm."),
    *((f"{_MEMORY}mask_downsampler.encoder.{3 * n + offset}.", f"{_MEMORY_HERE}mask_downsampler.layers.{n}.{here}.")
      for n in range(4) for offset, here in ((0, "conv"), (1, "layer_norm"))),
    (f"{_MEMORY}mask_downsampler.encoder.12.", f"{_MEMORY_HERE}mask_downsampler.final_conv."),
    (f"{_MEMORY}pix_feat_proj.", f"{_MEMORY_HERE}feature_projection."),
    (f"{_MEMORY}out_proj.", f"{_MEMORY_HERE}projection."),
    *((f"{_MEMORY}fuser.layers.{{i}}.{there}", f"{_MEMORY_HERE}memory_fuser.layers.{{i}}.{here}")
      for there, here in (("gamma", "scale"), ("dwconv.", "depthwise_conv."), ("norm.", "layer_norm."),
                          ("pwconv{j}.", "pointwise_conv{j}."))),
]  # fmt: skip
TABLE: tuple[tuple[str, str], ...] = (*_HEADS, *_VIDEO)
"""All rows, original prefix first."""
_TO_HF = [compile_row(there, here) for there, here in TABLE]


def to_tracker(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename original tensors for ``Sam3TrackerVideoModel``.

    A ``Sam3TrackerModel`` has the same names without those of the memory. The results are views where the value does
    not change.

    Returns:
        The renamed tensors, and the original names without a counterpart. In a published file these are the detector's
        own and the ``freqs_cis`` buffers (recomputed by transformers).

    Raises:
        UserError: A point embedding is missing or has an unexpected shape.
    """
    renamed, left = to_hf(state, [name for name in state if name.startswith(ORIGINAL_TRUNK)])
    neck = {name.replace(_NECK, _DETECTORS_NECK): state[name] for name in state if name.startswith(_NECK)}
    levels, unknown = to_hf(neck)
    renamed |= levels
    left += [name.replace(_DETECTORS_NECK, _NECK) for name in unknown]
    points: dict[str, Tensor] = {}
    for name in state:
        if name == _FOURIER:
            renamed |= dict.fromkeys(FOURIER_HERE, state[name])
        elif name.startswith(_POINTS):
            points[name] = state[name]
        elif (target := translate(name, _TO_HF)) is not None:
            renamed[target] = state[name]
        elif not name.startswith((ORIGINAL_TRUNK, _NECK)):
            left.append(name)
    if points:
        renamed[_POINTS_HERE] = _rows(points)
    return renamed, left


def _rows(points: Mapping[str, Tensor]) -> Tensor:
    """Stack the point embeddings, one tensor (1, channels) per kind of point, to one table (kinds, channels)."""
    names = [f"{_POINTS}{kind}.weight" for kind in range(len(points))]
    if missing := [name for name in names if name not in points]:
        raise UserError(f"{missing[0]}: missing, but the file has {len(points)} point embeddings")
    if len({tuple(points[name].shape) for name in names}) > 1 or points[names[0]].ndim != 2:
        raise UserError(f"{_POINTS}*: the point embeddings must all have the same shape (1, channels)")
    return torch.cat([points[name] for name in names])
