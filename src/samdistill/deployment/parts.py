"""What is exported of a model: one ``Part`` per file, with its inputs, outputs and valid examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Sizes = Mapping[str, int]
"""Length of each dynamic axis."""


@dataclass(frozen=True)
class Port:
    """An input or output of a file.

    Attributes:
        name: Its name in the file.
        dtype: Type of the tensor.
        shape: Length of each axis, or the name of a dynamic one.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Part:
    """One file to be exported.

    Attributes:
        name: Stem of the file.
        module: Eager module with positional tensor inputs. It returns a tuple of tensors.
        inputs: Its inputs.
        outputs: Its outputs.
        example: Function of sizes and seed to valid inputs.
        traced: Sizes of the example that is traced. All are at least 2 and differ, so that no axis looks like another
            one or like a constant.
        cases: Sizes at which the file is compared with ``reference``.
        reference: Computes the expected outputs from the same inputs. It is the model's own forward pass wherever
            ``module`` rearranges it.
        masks: Outputs that are mask logits.
        probe: Computes mask logits from the outputs of an image encoder, to compare what the features are for.

    Example:
        >>> import samdistill as sd
        >>> encoder = parts_of(sd.load("sandbox-mobile").network)[0]
        >>> encoder.name, encoder.inputs[0].shape
        ('vision_encoder', ('batch', 3, 126, 126))
    """

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    example: Callable[[Sizes, int], tuple[Tensor, ...]]
    traced: Sizes
    cases: tuple[Sizes, ...]
    reference: Callable[..., tuple[Tensor, ...]]
    masks: tuple[str, ...] = ()
    probe: Callable[..., Tensor] | None = None

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Names of the dynamic axes of the inputs, in the order of their first use."""
        return tuple(dict.fromkeys(axis for port in self.inputs for axis in port.shape if isinstance(axis, str)))


def ports(names: Sequence[str], *shape: int | str, dtype: torch.dtype = torch.float32) -> tuple[Port, ...]:
    """Return ports of the same type and shape."""
    return tuple(Port(name, dtype, tuple(shape)) for name in names)


_seen: ContextVar[Tensor | None] = ContextVar("images of examples", default=None)


@contextmanager
def seeing(images: Float[Tensor, "n 3 s s"]) -> Iterator[None]:
    """Make examples of images: inside the ``with`` block, ``pictures`` returns some of ``images``."""
    token = _seen.set(images)
    try:
        yield
    finally:
        _seen.reset(token)


def pictures(count: int, size: int, seed: int) -> Float[Tensor, "b 3 s s"]:
    """Draw images of coarse coloured fields with texture, with about zero mean and unit deviation.

    Args:
        count: Number of images.
        size: Side in pixels.
        seed: Seed of the images.
    """
    images = _seen.get()
    if images is not None and images.shape[-1] == size:
        return images[(torch.arange(count) + seed) % len(images)]
    generator = torch.Generator().manual_seed(seed)
    fields = F.interpolate(torch.randn(count, 3, 5, 5, generator=generator), (size, size), mode="nearest")
    shades = F.interpolate(torch.randn(count, 3, 9, 9, generator=generator), (size, size), mode="bilinear")
    return fields + 0.5 * shades + 0.1 * torch.randn(count, 3, size, size, generator=generator)


def samples(part: Part, images: Float[Tensor, "n 3 s s"]) -> list[tuple[np.ndarray, ...]]:
    """Return inputs of a part that come from images, one image each, in the order of its inputs."""
    sizes, found = {**part.traced, "batch": 1}, []
    for seed, image in enumerate(images):
        with torch.no_grad(), seeing(image[None]):
            found.append(tuple(one.numpy() for one in part.example(sizes, seed)))
    return found
