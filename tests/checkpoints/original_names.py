"""Tensors of our models under their original names, for tests and benchmarks that need original files.

The package reads such files and writes none: its tables are used here in the other direction.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from samdistill.checkpoints import rename, rename_sam

POSITIONS = "vision_encoder.backbone.embeddings.position_embeddings"
PROJECTION = "text_encoder.text_projection.weight"

# Substitutions, in order, from transformers' names to the original's; written after the original code, and in another
# direction than the package's table.
REFERENCE = [
    (r"^prompt_encoder\.", "tracker.sam_prompt_encoder."),
    (r"^mask_decoder\.", "tracker.sam_mask_decoder."),
    (r"^memory_attention\.layer_norm\.", "tracker.transformer.encoder.norm."),
    (r"^memory_attention\.", "tracker.transformer.encoder."),
    (r"^memory_encoder\.", "tracker.maskmem_backbone."),
    (r"^memory_temporal_positional_encoding", "tracker.maskmem_tpos_enc"),
    (r"^no_memory_embedding", "tracker.no_mem_embed"),
    (r"^no_memory_positional_encoding", "tracker.no_mem_pos_enc"),
    (r"^no_object_pointer", "tracker.no_obj_ptr"),
    (r"^occlusion_spatial_embedding_parameter", "tracker.no_obj_embed_spatial"),
    (r"^mask_downsample\.", "tracker.mask_downsample."),
    (r"^object_pointer_proj\.", "tracker.obj_ptr_proj."),
    (r"^temporal_positional_encoding_projection_layer\.", "tracker.obj_ptr_tpos_proj."),
    (r"mask_downsampler\.layers\.(\d)\.conv", lambda m: f"mask_downsampler.encoder.{3 * int(m[1])}"),
    (r"mask_downsampler\.layers\.(\d)\.layer_norm", lambda m: f"mask_downsampler.encoder.{3 * int(m[1]) + 1}"),
    (r"mask_downsampler\.final_conv", "mask_downsampler.encoder.12"),
    (r"feature_projection", "pix_feat_proj"),
    (r"maskmem_backbone\.projection", "maskmem_backbone.out_proj"),
    (r"memory_fuser", "fuser"),
    (r"\.scale$", ".gamma"),
    (r"depthwise_conv", "dwconv"),
    (r"pointwise_conv", "pwconv"),
    (r"shared_embedding\.positional_embedding", "pe_layer.positional_encoding_gaussian_matrix"),
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"\.o_proj\.", ".out_proj."),
    (r"layer_norm", "norm"),
    (r"mlp\.proj_in", "mlp.lin1"),
    (r"mlp\.proj_out", "mlp.lin2"),
    (r"(head|mlps\.\d|ptr_proj)\.layers\.0", r"\1.layers.1"),
    (r"\.proj_in\.", ".layers.0."),
    (r"\.proj_out\.", ".layers.2."),
]


def as_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tracker's tensors as ``sam3.pt`` has them."""
    vision, left = to_original({name: value for name, value in state.items() if name.startswith("vision_encoder.")})
    assert not left
    found = {name.replace("_backbone.convs.", "_backbone.sam2_convs."): value for name, value in vision.items()}
    for name, value in state.items():
        if name == "prompt_encoder.point_embed.weight":
            found |= {f"tracker.sam_prompt_encoder.point_embeddings.{i}.weight": value[i : i + 1] for i in range(4)}
        elif not name.startswith(("vision_encoder.", "shared_image_embedding.")):
            for pattern, replacement in REFERENCE:
                name = re.sub(pattern, replacement, name)
            found[name] = value
    return {name: value.clone() for name, value in found.items()}


def detector_rows() -> list[tuple[re.Pattern[str], str]]:
    """Patterns of transformers' names, and the beginnings of the original ones."""
    rows = []
    for original, ours in rename.TABLE:
        pattern = re.escape(ours).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", "(?P<p>[qkv])")
        rest = "[^.].*" if original.endswith((".", "_")) else ""
        rows.append((re.compile(f"^{pattern}(?P<rest>{rest})$"), f"detector.{original}"))
    return rows


DETECTOR_ROWS = detector_rows()
SAM_ROWS = [rename_sam.compile_row(here, there) for there, here in rename_sam.TABLE]


def to_original(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """``Sam3Model`` tensors under the names of ``sam3.pt`` (with ``detector.``), and the names left over.

    The class token of the position embedding is not in ``Sam3Model``; its row is zero.
    """
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    left: list[str] = []
    for name, value in state.items():
        found = next(((match, target) for pattern, target in DETECTOR_ROWS if (match := pattern.match(name))), None)
        if found is None:
            left.append(name)
            continue
        groups = found[0].groupdict()
        target = found[1].replace("{i}", groups.get("i") or "") + groups["rest"]
        if groups.get("p"):
            thirds.setdefault(target, {})[groups["p"]] = value
        elif name == POSITIONS:
            renamed[target] = torch.cat([torch.zeros_like(value[:, :1]), value], 1)
        else:
            renamed[target] = value.T.contiguous() if name == PROJECTION else value
    return renamed | {target: torch.cat([parts[p] for p in "qkv"]) for target, parts in thirds.items()}, left


def sam_to_original(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a ``SamModel`` or of a ``MobileSamModel`` on a TinyViT under their original names, and the names left
    over. TinyViT's classifier is not made up."""
    fourier = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    found = {name: rename_sam.translate(name, SAM_ROWS) for name in state}
    found |= {name: fourier for name in rename_sam.FOURIER_HERE if name in state}
    left = [name for name, target in found.items() if target is None]
    return {target: state[name] for name, target in found.items() if target is not None}, left


# as REFERENCE, for the image encoder of a SAM 2
SAM2_ENCODER = [
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"layer_norm", "norm"),
    (r"mlp\.proj_in", "mlp.layers.0"),
    (r"mlp\.proj_out", "mlp.layers.1"),
]


def sam2_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a ``Sam2VideoModel`` as ``sam2.1_hiera_*.pt`` has them."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("vision_encoder."):
            for pattern, target in SAM2_ENCODER:
                name = re.sub(pattern, target, name)
            found[name] = value
    others = as_original({name: value for name, value in state.items() if not name.startswith("vision_encoder.")})
    for name, value in others.items():
        for there, here in (
            ("tracker.transformer.encoder.", "memory_attention."), ("tracker.maskmem_backbone.", "memory_encoder."),
            ("tracker.", ""), (".mlp.lin1.", ".mlp.layers.0."), (".mlp.lin2.", ".mlp.layers.1."),
        ):  # fmt: skip
            name = name.replace(there, here)
        found[name] = value
    return found
