"""Batch norm with statistics of the micro-batches of all ranks, on GPU and CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. The gradient is also summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class _Synced:
    """Mixin before a BatchNorm class: statistics of all ranks in train mode, the parent's ``forward`` in eval mode.

    ``torch.nn.SyncBatchNorm`` has no CPU kernel. Without this class, two gloo ranks would not train like one process.
    """

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self
        if not norm.training:
            return super().forward(x)  # type: ignore[misc]
        axes = [0, *range(2, x.ndim)]
        shape = (1, -1, *(1,) * (x.ndim - 2))
        wide = x.float()
        own = wide.new_tensor([x.numel() // x.shape[1]])
        *_, count = total = _AllReduceSum.apply(torch.cat([wide.sum(axes), own]))  # ranks may have unequal batches
        mean = total[:-1] / count
        centred = wide - mean.view(shape)
        var = _AllReduceSum.apply(centred.square().sum(axes)) / count
        if norm.track_running_stats:
            _update(norm, mean.detach(), var.detach() * (count / (count - 1).clamp(min=1)))
        out = centred * torch.rsqrt(var + norm.eps).view(shape)
        if norm.affine:
            out = out * norm.weight.view(shape) + norm.bias.view(shape)
        out = out.to(x.dtype)
        return norm.act(norm.drop(out)) if hasattr(norm, "act") else out  # timm's BatchNormAct2d


@torch.no_grad()
def _update(norm: Any, mean: Tensor, unbiased: Tensor) -> None:
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm of ``model`` share its statistics across ranks.

    Names of parameters and buffers do not change. On CUDA this is ``SyncBatchNorm``, set up with timm, which supports
    its fused norm and activation layers.
    """
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kind = type(module)
            module.__class__ = type(f"Synced{kind.__name__}", (_Synced, kind), {})
    return model
