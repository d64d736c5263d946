"""Operations against a count by hand, on a device with a fused attention kernel and on one without."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from samdistill.ops.flops import count_flops

HEADS, TOKENS, CHANNELS = 2, 9, 16


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_two_matrix_products(device: str, masked: bool) -> None:
    q = torch.zeros(1, HEADS, TOKENS, CHANNELS, device=device, requires_grad=True)
    mask = torch.zeros(TOKENS, TOKENS, device=device) if masked else None
    with count_flops() as counter:
        out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert counter.get_total_flops() == 2 * (2 * HEADS * TOKENS * TOKENS * CHANNELS)
    assert not out.requires_grad


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_convolutions_and_linear_layers(device: str) -> None:
    layers = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(6 * 5 * 5, 7)).to(device)
    with count_flops() as counter:
        layers(torch.zeros(1, 4, 5, 5, device=device))
    convolution = 2 * (5 * 5) * 6 * (4 // 2) * (3 * 3)
    assert counter.get_total_flops() == convolution + 2 * 150 * 7
