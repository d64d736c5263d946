"""Export targets. A target is one module with a class that ``TARGETS.register`` decorates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor

from ..registry import Registry
from ..types import UserError
from .parts import Part


class Session(Protocol):
    """A file opened for running: arrays in the order of the inputs to arrays in the order of the outputs."""

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Contents:
    """What a file says about itself.

    Attributes:
        inputs: Shape of each input, with the name of each dynamic axis.
        operators: Number of uses of each operator.
        opset: Version of the operator set, or None for formats without one.
    """

    inputs: dict[str, tuple[int | str, ...]]
    operators: dict[str, int]
    opset: int | None = None


class Target(Protocol):
    """An export format.

    Attributes:
        extension: Suffix of its files.
        install: How ``needs`` is installed, see ``extra``.
        needs: Modules that it imports.
        precisions: Precisions that it has. ``convert`` writes the first, fp32, and ``reduce`` the others.
        ran_here: Whether ``open`` can run a file on this machine. The gate compares the structure alone otherwise.
    """

    extension: ClassVar[str]
    install: ClassVar[str]
    needs: ClassVar[Sequence[str]]
    precisions: ClassVar[Sequence[str]]
    ran_here: ClassVar[bool]

    @staticmethod
    def convert(part: Part, path: Path, static: bool) -> None:
        """Write ``part`` to ``path``. Raises ``UserError`` with the reason if the format cannot express it."""

    @staticmethod
    def reduce(part: Part, source: Path, path: Path, precision: str, pixels: Tensor | None) -> None:
        """Write ``part`` again in a smaller precision. Inputs and outputs keep their types.

        Args:
            part: What the file was made of.
            source: The fp32 file, which ``convert`` wrote.
            path: The file to write.
            precision: One of ``precisions`` other than fp32.
            pixels: Calibration images as normalised input (n, 3, s, s), for int8.

        Raises:
            UserError: The format cannot express the part in this precision.
        """

    @staticmethod
    def open(path: Path) -> Session:
        """Open a file for running on the CPU."""

    @staticmethod
    def read(path: Path) -> Contents:
        """Read a file's own description."""


TARGETS: Registry[type[Target]] = Registry("export target", "samdistill.deployment.targets_known")
"""Targets by the names of ``--to``."""


def extra(name: str) -> str:
    """Return the command that installs an extra of this package."""
    return f"pip install 'samdistill[{name}]'"


def target(name: str) -> type[Target]:
    """Return a target whose libraries are installed.

    Raises:
        UserError: There is no such target, or a library is missing.
    """
    found = TARGETS.get(name)
    if missing := [module for module in found.needs if find_spec(module) is None]:
        raise UserError(f"--to {name} needs {', '.join(missing)}, not installed here: {found.install}")
    return found
