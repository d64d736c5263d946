"""What a test needs to see that a model lost no tensor on its way through a file."""

from __future__ import annotations

import torch
from torch import nn


def scramble(model: nn.Module) -> None:
    """Give every saved tensor a value of its own, so that a tensor left at its initial value shows."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(0.5 + noise if name.endswith("running_var") else tensor + 0.05 * (noise - 0.5))
        else:
            tensor.fill_(7)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything a forward pass may read, saved or not."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_tensors(first: nn.Module, second: nn.Module) -> None:
    one, other = tensors(first), tensors(second)
    assert set(one) == set(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
