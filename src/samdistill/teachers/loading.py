"""What teachers share: reading a configuration, freezing an encoder, taking its fingerprint."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ..ops.images import Statistics
from ..types import UserError


def square(size: Any, where: str) -> int:
    """A configuration's image size, given as a number or as two equal ones."""
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int):
        raise UserError(f"{where}: image size {size} is not square; only square inputs are supported")
    return sides[0]


def freeze(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Eval mode, no gradients, parameters in ``dtype``.

    Buffers keep float32: rotary frequencies and positions would lose digits that the checkpoint's authors had.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    return module.eval()


def fingerprint(
    module: nn.Module, behaviour: dict[str, Any], image_size: int, mean: Statistics, std: Statistics
) -> str:
    """Hex SHA-256 over name, dtype, shape and bytes of every tensor, and over what else decides the output.

    ``behaviour``: settings that no tensor shows, such as the number of heads. Call it before moving to a device.
    """
    digest = hashlib.sha256()
    about = {"behaviour": behaviour, "image_size": image_size, "mean": list(mean), "std": list(std)}
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# where a configuration comes from and how it starts a training; no output depends on it
_NEUTRAL = ("_name_or_path", "architectures", "dtype", "initializer_range", "transformers_version")


def settings(node: Any) -> Any:
    """A configuration without what no output depends on."""
    if not isinstance(node, dict):
        return node
    return {key: settings(value) for key, value in node.items() if key not in _NEUTRAL}
