"""Where this process runs: its device, its rank and the number of processes of the run."""

from __future__ import annotations

import os

import torch


def process_rank() -> int:
    """Rank of this process under torchrun, else 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes of the run under torchrun, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def default_device() -> torch.device:
    """CUDA if there is one (under torchrun the one of this process), else MPS, else the CPU."""
    if torch.cuda.is_available():
        rank = os.environ.get("LOCAL_RANK")
        return torch.device("cuda") if rank is None else torch.device("cuda", int(rank) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
