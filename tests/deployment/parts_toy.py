"""A part of a few operators, and a target that runs Python instead of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from samdistill.deployment.parts import Part, Sizes, ports
from samdistill.deployment.targets import Contents

Broken = Callable[[int, list[np.ndarray]], list[np.ndarray]]


class Toy(nn.Module):
    """Scores and mask logits of prompts on images, as the decoders give them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.score, self.mask = nn.Linear(4, 1), nn.Conv2d(3, 2, 1)

    def forward(self, pixels: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        features = self.mask(pixels).mean(1)
        each = features[:, None].expand(-1, prompts.shape[1], -1, -1)
        return self.score(prompts)[..., 0], each * prompts.mean(-1)[..., None, None]


def example(sizes: Sizes, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(sizes["batch"], 3, 8, 8, generator=draw),
        torch.randn(sizes["batch"], sizes["prompts"], 4, generator=draw),
    )


def toy_part(module: nn.Module | None = None, name: str = "toy") -> Part:
    module = Toy() if module is None else module
    return Part(
        name, module.eval(), (*ports(["pixels"], "batch", 3, 8, 8), *ports(["prompts"], "batch", "prompts", 4)),
        (*ports(["scores"], "batch", "prompts"), *ports(["masks"], "batch", "prompts", 8, 8)), example,
        traced={"batch": 2, "prompts": 3},
        cases=({"batch": 2, "prompts": 2}, {"batch": 1, "prompts": 1}, {"batch": 3, "prompts": 4}),
        reference=module, masks=("masks",),
    )  # fmt: skip


class Eager:
    """Target whose file holds axes as JSON, and whose session calls ``run``."""

    extension, install, needs, ran_here = ".json", "", (), True
    precisions = ("fp32",)
    run: Callable[..., Sequence[Tensor]]
    broken: Broken

    @staticmethod
    def convert(part: Part, path: Path, static: bool) -> None:
        path.write_text(json.dumps({port.name: list(port.shape) for port in part.inputs}))

    @classmethod
    def open(cls, path: Path) -> Callable[..., list[np.ndarray]]:
        calls = [0]

        def session(*given: np.ndarray) -> list[np.ndarray]:
            calls[0] += 1
            with torch.no_grad():
                found = [one.numpy() for one in cls.run(*map(torch.from_numpy, given))]
            return cls.broken(calls[0], found)

        return session

    @staticmethod
    def read(path: Path) -> Contents:
        return Contents({name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}, {"Toy": 1})


def eager_target(run: Callable[..., Sequence[Tensor]], broken: Broken = lambda call, found: found) -> type[Eager]:
    return type("Made", (Eager,), {"run": staticmethod(run), "broken": staticmethod(broken)})
