"""Opening of a SAM as teacher or host: configuration and tensors under transformers' names, from a folder or a file."""

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
from .rename_sam import FOURIER_HERE, SAM, layout, sam_settings, to_ours

SAM_TYPES = (SamConfig.model_type, HostedSamConfig.model_type)
"""Model types of SAMs that can host a trunk."""


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
    return layout(open_weights(place)) if place.suffix in TORCH_SUFFIXES else None


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
    state = renamed(weights, SAM.upper())
    state[FOURIER_HERE[1]] = state[FOURIER_HERE[1]].clone()  # safetensors holds no tensor under two names
    return OpenedSam(place, config, state, {name: TensorInfo.of(tensor) for name, tensor in state.items()})


def original_sam_config(weights: Weights) -> PreTrainedConfig:
    """Derive the configuration of an original SAM from its tensors.

    Raises:
        UserError: It is another model, or tensors are missing.
    """
    if layout(weights) != SAM:
        raise UserError(f"{weights.source}: not an original SAM, by its tensor names; give a sam_vit_*.pth or a folder")
    with foreign(weights.source, "not a complete SAM: its architecture does not follow from its tensors"):
        return SamConfig(**sam_settings(weights.info))


def renamed(weights: Weights, what: str) -> dict[str, Tensor]:
    """Return the tensors of an original SAM or MobileSAM under our names.

    Args:
        weights: Tensors by their original names.
        what: Name of the model in error messages.

    Raises:
        UserError: A name is unknown.
    """
    state, unknown = to_ours(weights)
    if unknown:
        raise UserError(
            f"{weights.source}: wrong checkpoint: {len(unknown)} unknown tensors for an original {what}, such as "
            f"{unknown[0]}"
        )
    return state
