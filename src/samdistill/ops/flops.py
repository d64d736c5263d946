"""Count floating-point operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """Count the operations of convolutions, matrix products and attention inside a ``with`` block.

    A multiply-add counts as two operations. Gradients are disabled. Attention runs as two matrix products, because
    torch counts some of its fused kernels as zero operations (the CPU's is one of them), and the device and the version
    decide which kernel runs.

    Yields:
        torch's counter.

    Example:
        >>> with count_flops() as counter:
        ...     model(pixels)
        >>> counter.get_total_flops()
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        yield counter
