"""Helpers of teachers: configurations, freezing, and fingerprints."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ..ops.digest import hash_tensors
from ..ops.images import Statistics
from ..types import UserError


def square(size: Any, where: str) -> int:
    """Return the image size of a configuration, given as one number or as two equal ones."""
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int):
        raise UserError(f"{where}: image size {size} is not square; only square inputs are supported")
    return sides[0]


def freeze(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Set eval mode, turn off gradients, and convert the parameters to ``dtype``.

    Buffers keep their dtype, because rotary frequencies and positions would lose precision.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    return module.eval()


def fingerprint(
    module: nn.Module, behaviour: dict[str, Any], image_size: int, mean: Statistics, std: Statistics
) -> str:
    """Return a hex SHA-256 digest of all that determines the output of a model.

    It covers the name, dtype, shape and bytes of every tensor. Call it before moving the module to a device.

    Args:
        module: The model, on the CPU.
        behaviour: Settings that no tensor shows, such as the number of heads.
        image_size: Side of the input in pixels.
        mean: Mean of the normalisation.
        std: Standard deviation of the normalisation.
    """
    about = {"behaviour": behaviour, "image_size": image_size, "mean": list(mean), "std": list(std)}
    return digest_of(module, about)


def digest_of(module: nn.Module, about: dict[str, Any]) -> str:
    """Return ``fingerprint`` of a model that reads no images. ``about`` has the settings that no tensor shows."""
    digest = hashlib.sha256()
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    hash_tensors(digest, sorted(module.state_dict().items()))
    return digest.hexdigest()


# the output depends on none of these: they describe the origin of a configuration or the start of a training
_NEUTRAL = ("_name_or_path", "architectures", "dtype", "initializer_range", "transformers_version")


def settings(node: Any) -> Any:
    """Return a configuration without the keys on which no output depends."""
    if not isinstance(node, dict):
        return node
    return {key: settings(value) for key, value in node.items() if key not in _NEUTRAL}
