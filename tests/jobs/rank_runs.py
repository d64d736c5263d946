"""Runs of real tasks on two gloo ranks, and batch norm over unequal shares: one start of two processes for all.

python rank_runs.py FOLDER: trains every ``FOLDER/*.yaml`` and writes ``FOLDER/norm{rank}.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from samdistill.engine import is_worker, launch, leave
from samdistill.engine.norm import synchronise_batch_norm
from samdistill.jobs.loading import load_config
from samdistill.pipeline import train
from samdistill.processes import end_with_parent

SHARES = {"batch": (8, 1), "lines": (3, 5), "act": (1, 4)}
"""Samples of each rank, by the kind of layer."""


def norm_layer(kind: str) -> nn.Module:
    from timm.layers import BatchNormAct2d

    torch.manual_seed(1)
    layer = {"batch": nn.BatchNorm2d, "lines": nn.BatchNorm1d, "act": BatchNormAct2d}[kind](3)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def norm_batch(kind: str) -> torch.Tensor:
    """Of both ranks, the second one's part unlike the first one's."""
    first, second = SHARES[kind]
    size = () if kind == "lines" else (4, 5)
    x = torch.randn(first + second, 3, *size, generator=torch.Generator().manual_seed(2))
    x[first:] = 3 * x[first:] + 5
    return x


def norm_step(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, and gradients of a sum over samples, which are sums over ranks too."""
    x = x.clone().requires_grad_()
    out = layer(x)
    (out.tanh() * torch.arange(1.0, 4).view(1, 3, *(1,) * (x.ndim - 2))).sum().backward()
    grads = {f"d {name}": p.grad for name, p in layer.named_parameters()}
    return {"out": out.detach(), "dx": x.grad, **grads, **dict(layer.named_buffers())}


def main(folder: Path) -> int:
    if not is_worker():
        return launch(2, [str(folder)], program=(str(Path(__file__).resolve()),))
    for path in sorted(folder.glob("*.yaml")):
        train(load_config(str(path)))
    rank, found = torch.distributed.get_rank(), {}
    for kind, shares in SHARES.items():
        own = norm_batch(kind).split(list(shares))[rank]
        found[kind] = norm_step(synchronise_batch_norm(norm_layer(kind).train(), torch.device("cpu")), own)
    torch.save(found, folder / f"norm{rank}.pt")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    end_with_parent()  # ranks with their launcher, and the launcher with the tests
    try:
        sys.exit(main(Path(sys.argv[1])))
    finally:
        leave()
