"""Random number generators of a run: their states in a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12


class Streams(TypedDict):
    """State of random number generators, see ``capture_rng``."""

    python: tuple[int, Tensor, float | None]
    numpy: tuple[str, Tensor, int, int, float]
    torch: Tensor
    device: Tensor | None


def capture_rng(device: torch.device) -> dict[str, Any]:
    """Return the states of the global generators of Python, NumPy and torch, in types that ``weights_only`` loads."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "device": _device_rng(device).get_rng_state() if device.type != "cpu" else None,
    }


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the states of ``capture_rng``."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        _device_rng(device).set_rng_state(state["device"])


def _device_rng(device: torch.device) -> Any:
    return getattr(torch, device.type)


def seed_rng(seed: int) -> None:
    """Seed all global generators of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
