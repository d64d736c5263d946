"""Location of the image trunk in a SAM 3 checkpoint: in its configuration and in the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .files import TensorInfo

VIT = "sam3_vit_model"
STUDENT_TRUNK = "samdistill_student_trunk"
DETECTOR, TRACKER = "detector.", "tracker."
ORIGINAL_TRUNK = "detector.backbone.vision_backbone.trunk."
ORIGINAL_STUDENT = "detector.backbone.vision_backbone.trunk.model."
ORIGINAL_TEXT = "detector.backbone.language_backbone."
HF_TRUNK = "vision_encoder.backbone."

_PATCHES = re.compile(r"^(.*?)embeddings\.patch_embeddings\.projection\.weight$")
_HF_TRUNK = re.compile(r"^(.*?vision_encoder\.backbone\.)")
# These names occur only in the ViT of SAM 3, in transformers' layout and in the original one.
_VIT_TENSOR = re.compile(
    r"(^|\.)(embeddings\.(position_embeddings|patch_embeddings\.projection\.\w+)|"
    r"backbone\.layers\.\d+\.(attention\.[qkvo]_proj|layer_norm[12]|mlp\.fc[12])\.\w+|"
    r"vision_encoder\.backbone\.layer_norm\.\w+|"
    r"trunk\.(pos_embed|patch_embed\.proj\.\w+|ln_pre\.\w+|blocks\.\d+\..*))$"
)
_NECK = re.compile(
    r"^(?P<level>.*(?:fpn_layers|convs)\.\d+\.)(?P<layer>scale_layers\.0|dconv_2x2(?:_0)?|proj1|conv_1x1)\.weight$"
)


def vision_configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every ``vision_config`` of a SAM 3 ``config.json``. The video model has two.

    A missing ``vision_config`` is created. The dictionaries are those inside ``config``, so changes to them change
    ``config``.
    """
    parts = [config]
    if config.get("model_type") == "sam3_video":
        parts = [_child(config, "detector_config"), _child(config, "tracker_config")]
    return [_child(part, "vision_config") for part in parts]


def _child(parent: dict[str, Any], key: str) -> dict[str, Any]:
    if parent.get(key) is None:
        parent[key] = {}
    return parent[key]


def vit_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix of the names of SAM 3's ViT in transformers' layout, or None if the ViT is not there.

    The prefix depends on the class:

    - ``Sam3Model``: ``vision_encoder.backbone.``
    - ``Sam3VideoModel``: ``detector_model.vision_encoder.backbone.``
    - a saved ``Sam3TrackerModel``: ``tracker_model.detector_model.vision_encoder.backbone.``
    """
    found = {match[1] for name in names if (match := _PATCHES.match(name))}
    return min(found, key=len) if found else None


def hf_trunk_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix of the image trunk, teacher's or student's, in a Hugging Face SAM 3 with heads, or None."""
    found = {match[1] for name in names if (match := _HF_TRUNK.match(name))}
    return min(found, key=len) if found else None


def is_vit_tensor(name: str) -> bool:
    """Whether a name is that of a tensor of SAM 3's own ViT, in either layout and under any prefix."""
    return _VIT_TENSOR.search(name) is not None


def neck_inputs(info: dict[str, TensorInfo]) -> dict[str, int]:
    """Return the channels that each level of each neck (detector's, tracker's) takes from the trunk, by level name."""
    channels: dict[str, int] = {}
    for name, (shape, _) in info.items():
        match = _NECK.match(name)
        if not match or len(shape) != 4:
            continue
        transposed = match["layer"].startswith(("scale", "dconv"))  # transposed convolutions store (in, out, ...)
        if transposed or match["level"] not in channels:
            channels[match["level"]] = shape[0] if transposed else shape[1]
    return channels
