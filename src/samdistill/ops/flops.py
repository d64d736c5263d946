"""Counting floating-point operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """Inside, no gradients are recorded and the counter counts convolutions, matrix products and attention.

    A multiply-add is two operations. Attention runs as two matrix products: torch has no formula for some of its fused
    kernels (that of the CPU) and counts them as nothing, and which kernel runs depends on device and version.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        yield counter
