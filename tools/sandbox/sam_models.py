"""The sandbox's SAM and MobileSAM: tiny models that correspond to SAM ViT-H and to MobileSAM, its student."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Sam3TrackerModel, SamConfig, SamModel

from samdistill.checkpoints.promptable import load_promptable
from samdistill.ops.images import IMAGENET_MEAN, IMAGENET_STD, SAM3_MEAN, SAM3_STD
from samdistill.students.promptable import MobileSamConfig, MobileSamModel
from tracker_model import HIDDEN, IMAGE_SIZE, PATCH, initialise

HEADS = 4
MLP = 8 * HIDDEN
"""Hidden units of the decoder's feed-forward layers: 8 times the width, as in SAM."""
BACKBONE = "efficientvit_b0.r224_in1k"
_TRUNK = {"attn.proj": "attention.o_proj", "mlp.lin1": "mlp.fc1", "mlp.lin2": "mlp.fc2"}
_DECODER = {"out_proj": "o_proj", "mlp.lin1": "mlp.proj_in", "mlp.lin2": "mlp.proj_out"}
"""Names of modules in a SAM, and their names in a SAM 3."""


def sam_config() -> SamConfig:
    """Return a configuration with the tracker's geometry: 126 px, patches of 14, a ViT of 6 layers, 192 wide, with
    global attention, and the same decoder width."""
    sizes = {"image_size": IMAGE_SIZE, "patch_size": PATCH}
    config = SamConfig(
        vision_config={
            **sizes, "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6,
            "window_size": IMAGE_SIZE // PATCH, "global_attn_indexes": list(range(6)), "output_channels": HIDDEN,
            "num_pos_feats": HIDDEN // 2,
        },
        prompt_encoder_config={**sizes, "hidden_size": HIDDEN},
        mask_decoder_config={
            "hidden_size": HIDDEN, "mlp_dim": MLP, "num_attention_heads": HEADS, "iou_head_hidden_dim": HIDDEN,
            "layer_norm_eps": 1e-5,
        },
    )  # fmt: skip
    config.vision_config.scale = 1  # scale of the random Fourier features, as in SAM's code and weights
    return config


def build_sam(seed: int = 0) -> SamModel:
    """Build a SAM for training with weights of the bundled tracker.

    The ViT (without rotary embeddings, which a SAM does not have), the prompt encoder and the decoder have the
    tracker's weights. The additional units of the decoder's feed-forward layers start with zero output. The neck and
    the relative positions have a new initialisation.
    """
    torch.manual_seed(seed)
    model = SamModel(sam_config())
    initialise(model)
    tracker = load_promptable("sandbox")
    assert isinstance(tracker, Sam3TrackerModel)
    given = _trunk(tracker, model) | _prompt_half(tracker, model)
    model.load_state_dict(given, strict=False)
    return model


def build_mobile(seed: int = 0) -> MobileSamModel:
    """Build a MobileSAM for training: a random trunk, and prompt encoder and decoder of the bundled SAM.

    The published MobileSAM has those of SAM ViT-H in the same way.
    """
    torch.manual_seed(seed)
    config = MobileSamConfig(backbone=BACKBONE, image_size=IMAGE_SIZE, patch_size=PATCH, width=HIDDEN, heads=HEADS)
    model = MobileSamModel(config)
    given = load_promptable("sandbox-sam").state_dict()
    model.load_state_dict({name: given[name] for name in given if not name.startswith("vision_encoder.")}, strict=False)
    return model


def _trunk(tracker: Sam3TrackerModel, model: SamModel) -> dict[str, Tensor]:
    """Return the tracker's ViT with the tensor names of a SAM."""
    theirs, own = tracker.vision_encoder.backbone.state_dict(), model.vision_encoder.state_dict()
    scale, shift = (
        theirs["layer_norm.weight"],
        theirs["layer_norm.bias"],
    )  # the input of this norm has about unit variance
    patches = theirs["embeddings.patch_embeddings.projection.weight"] * scale[:, None, None, None]
    found = _other_statistics(patches)
    positions = theirs["embeddings.position_embeddings"] * scale + shift
    found["pos_embed"] = positions.view(own["pos_embed"].shape)
    for name in own:
        if name.endswith(("attn.qkv.weight", "attn.qkv.bias")):
            parts = (theirs[name.replace("attn.qkv", f"attention.{part}_proj")] for part in "qkv")
            found[name] = torch.cat(list(parts))
        elif (source := _renamed(name, _TRUNK)) in theirs:
            found[name] = theirs[source]
    return {f"vision_encoder.{name}": tensor for name, tensor in found.items()}


def _renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def _other_statistics(patches: Float[Tensor, "d 3 p p"]) -> dict[str, Tensor]:
    """Convert a patch embedding from SAM 3's image normalisation to ImageNet's."""
    mean, std, mean3, std3 = (torch.tensor(v) for v in (IMAGENET_MEAN, IMAGENET_STD, SAM3_MEAN, SAM3_STD))
    return {
        "patch_embed.projection.weight": patches * (std / std3)[:, None, None],
        "patch_embed.projection.bias": (patches * ((mean - mean3) / std3)[:, None, None]).sum((1, 2, 3)),
    }


def _prompt_half(tracker: Sam3TrackerModel, model: SamModel) -> dict[str, Tensor]:
    """Return the tracker's prompt encoder and mask decoder with the tensor names of a SAM."""
    theirs, own, found = tracker.state_dict(), model.state_dict(), {}
    points = theirs.pop("prompt_encoder.point_embed.weight")
    for name, tensor in own.items():
        if name.startswith("prompt_encoder.point_embed."):
            index = int(name.split(".")[2])
            found[name] = points[index : index + 1]
        elif not name.startswith("vision_encoder.") and (source := _renamed(name, _DECODER)) in theirs:
            found[name] = _widened(theirs[source], tensor, silent="lin2" in name)
    return found


def _widened(given: Tensor, own: Tensor, silent: bool) -> Tensor:
    """Copy ``given`` into the first entries of ``own``. The other entries are kept, or set to zero if ``silent``."""
    wide = torch.zeros_like(own) if silent else own.clone()
    wide[tuple(slice(size) for size in given.shape)] = given
    return wide
