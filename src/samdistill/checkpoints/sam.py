"""Opening of a SAM or SAM 2 as teacher or host: configuration and tensors under transformers' names.

Sources are Hugging Face folders and original files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, SamConfig

from ..reading import foreign
from ..students import HostedSamConfig
from ..types import UserError
from .files import TORCH_SUFFIXES, TensorInfo, Weights, locate, open_weights
from .loading import CONFIG, locate_config, read_settings
from .rename_sam import FOURIER_HERE, TITLES, layout, sam_settings, to_ours
from .rename_sam2 import SAM2, is_sam2, sam2_config, to_sam2

SAM_TYPES = (SamConfig.model_type, HostedSamConfig.model_type, "sam2", SAM2)
"""Model types that can host a trunk without being a SAM 3."""
FINE_LEVELS = {"high_resolution_0": "conv_s0", "high_resolution_1": "conv_s1"}
"""Levels of a SAM 2 that are finer than the image embedding, finest first: tap and projection in the mask decoder."""


_TITLES = {**TITLES, SAM2: "SAM 2"}


@dataclass(frozen=True)
class OpenedSam:
    """Configuration and tensors of a SAM.

    Attributes:
        source: Its folder or file.
        config: Configuration of transformers' class.
        weights: Tensors by the names of that class, read when they are indexed.
        info: Shape and dtype of each tensor.
    """

    source: Path
    config: Any
    weights: Mapping[str, Tensor]
    info: dict[str, TensorInfo]


def sam_kind(path: str | Path) -> str | None:
    """Return the model type of a checkpoint: that of its ``config.json``, or that of an original SAM file.

    None for another file. For a hub id only ``config.json`` is downloaded.

    Raises:
        UserError: The path does not exist, or its ``config.json`` cannot be read.
    """
    place = locate(path, (CONFIG,))
    if place.is_dir():
        return read_settings(place).get("model_type") if (place / CONFIG).is_file() else None
    return original_kind(open_weights(place)) if place.suffix in TORCH_SUFFIXES else None


def original_kind(names: Mapping[str, Any]) -> str | None:
    """Return ``sam``, ``mobile_sam``, ``edge_sam`` or ``sam2_video`` by the names in an original file, or None."""
    return SAM2 if is_sam2(names) else layout(names)


def sam_config(path: str, kind: str) -> tuple[Path, Any]:
    """Return the folder or file of a SAM, and its configuration. For a hub id only ``config.json`` is downloaded.

    Args:
        path: A folder, a hub id, or an original file.
        kind: Kind of model, for the error message.

    Raises:
        UserError: It is no SAM, or its configuration cannot be read.
    """
    place = locate(path, (CONFIG,))
    return (place, original_sam_config(open_weights(place))) if place.is_file() else locate_config(path, kind)


def open_sam(path: str | Path) -> OpenedSam:
    """Open a SAM with its weights. Arguments and errors are those of ``sam_config``."""
    place = locate(path)
    weights = open_weights(place)
    if place.is_dir():
        return OpenedSam(place, locate_config(str(place), "SAM")[1], weights, weights.info)
    config = original_sam_config(weights)
    state = renamed(weights)
    if FOURIER_HERE[1] in state:
        state[FOURIER_HERE[1]] = state[FOURIER_HERE[1]].clone()  # safetensors holds no tensor under two names
    return OpenedSam(place, config, state, {name: TensorInfo.of(tensor) for name, tensor in state.items()})


def original_sam_config(weights: Weights) -> PreTrainedConfig:
    """Derive the configuration of an original SAM or SAM 2 from its tensors.

    Raises:
        UserError: It is another model, or tensors are missing.
    """
    kind = original_kind(weights)
    if kind not in SAM_TYPES:
        raise UserError(
            f"{weights.source}: not an original SAM or SAM 2, by its tensor names; give a sam_vit_*.pth, a "
            "sam2*_hiera_*.pt or a folder"
        )
    with foreign(weights.source, "not a complete SAM: its architecture does not follow from its tensors"):
        if kind == SAM2:
            return sam2_config(weights.info, weights.source)
        return SamConfig(**sam_settings(weights.info))


def renamed(weights: Weights) -> dict[str, Tensor]:
    """Return the tensors of an original SAM, MobileSAM, EdgeSAM or SAM 2 under our names.

    Raises:
        UserError: A name is unknown.
    """
    kind = original_kind(weights) or ""
    state, unknown = to_sam2(weights) if kind == SAM2 else to_ours(weights)
    if unknown:
        raise UserError(
            f"{weights.source}: wrong checkpoint: {len(unknown)} unknown tensors for an original "
            f"{_TITLES.get(kind, kind)}, such as {unknown[0]}"
        )
    return state


def fine_projection(opened: OpenedSam, name: str) -> dict[str, Tensor]:
    """Return weight and bias of a projection of fine levels in the mask decoder of a SAM 2.

    Raises:
        UserError: It has none.
    """
    begin = f"mask_decoder.{name}."
    found = {key: f"{begin}{key}" for key in ("weight", "bias")}
    if missing := [there for there in found.values() if there not in opened.info]:
        raise UserError(f"{opened.source}: wrong checkpoint: no {missing[0]} in it; give a whole SAM 2")
    return {key: opened.weights[there].float() for key, there in found.items()}
