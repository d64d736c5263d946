"""``torch.export`` of a part with fixed axes, for the targets that start from it."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partialmethod
from io import StringIO

import torch
from torch import nn
from torch.export import ExportedProgram
from tqdm import tqdm

from ..reading import one_line
from ..types import UserError
from . import workarounds
from .parts import Part


def refuse_dynamic(part: Part, static: bool, target: str, reason: str) -> None:
    """Refuse a part with dynamic axes.

    Args:
        part: The part.
        static: Whether all axes are fixed.
        target: Name of the format, for people.
        reason: Why the axes have to be fixed.

    Raises:
        UserError: The part has dynamic axes and ``static`` is not set.
    """
    if not static and part.axes:
        kinds = f"axis {part.axes[0]}" if len(part.axes) == 1 else f"axes {', '.join(part.axes)}"
        raise UserError(f"{part.name}: the {kinds} must be fixed for {target}, because {reason}; add --static")


def plain(name: str) -> str:
    """Return a name of an input or output for formats whose names have no dots: ``image_embeddings_0``."""
    return name.replace(".", "_")


def dotted(name: str) -> str:
    """Return the name that ``plain`` was given. Only the numbers of levels follow a dot."""
    return re.sub(r"_(\d+)$", r".\1", name)


def program(part: Part, module: nn.Module | None = None) -> ExportedProgram:
    """Trace a part with the axes of its example.

    Args:
        part: The part.
        module: A wrapper of ``part.module`` with the same inputs. None means ``part.module`` itself.

    Raises:
        UserError: torch cannot trace it.
    """
    example = tuple(one.contiguous() for one in part.example(part.traced, 0))
    with workarounds.exporting(part.module, example, False), quiet(), telling(part, "torch.export"):
        return torch.export.export((module or part.module).eval(), example, strict=False)


@contextmanager
def telling(part: Part, target: str) -> Iterator[None]:
    """Convert an error of a converter to a ``UserError`` that names the part.

    Converters raise any exception for an operator that they do not have.

    Raises:
        UserError: The body raised an exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        reason = re.sub(r"\S*/site-packages/", "", one_line(error))  # converters name places in libraries
        raise UserError(f"{part.name}: cannot be converted to {target}: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, log lines, prints and progress bars of a converter inside a ``with`` block."""
    before, silent = logging.root.manager.disable, partialmethod(tqdm.__init__, disable=True)
    with warnings.catch_warnings(), redirect_stdout(StringIO()), workarounds.replaced(tqdm, "__init__", silent):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
