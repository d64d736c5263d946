"""Rank, number of processes and default device of this process."""

from __future__ import annotations

import os

import torch


def process_rank() -> int:
    """Return the rank of this process under torchrun, else 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes under torchrun, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def default_device() -> torch.device:
    """Return CUDA if available (under torchrun the device of the local rank), else MPS, else the CPU."""
    if torch.cuda.is_available():
        rank = os.environ.get("LOCAL_RANK")
        return torch.device("cuda") if rank is None else torch.device("cuda", int(rank) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
