"""Digests of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


class Digest(Protocol):
    """A digest of ``hashlib``."""

    def update(self, data: bytes, /) -> None: ...


def hash_tensors(digest: Digest, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Update a digest with the name, dtype, shape and bytes of each tensor."""
    for name, tensor in tensors:
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
