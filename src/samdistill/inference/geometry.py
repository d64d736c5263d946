"""How images are fitted to a model's canvas. The geometry is a property of a model and saved with it."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from ..checkpoints.processors import geometry_of
from ..data.transforms import Geometry
from ..ops.promptable import Promptable, image_size
from ..types import UserError


def canvas_of(model: Any, geometry: str | None = None) -> Geometry:
    """Return the canvas of a promptable model or a detector.

    Args:
        model: An opened model.
        geometry: ``square`` or ``longest_side``; None uses the model's own.

    Raises:
        UserError: There is no such geometry.
    """
    network, side = (model, image_size(model)) if isinstance(model, Promptable) else (model.model, model.image_size)
    return Geometry(side, own_geometry(network) if geometry is None else check_geometry(geometry))


def own_geometry(model: nn.Module) -> str:
    """Return the geometry of the images a model was trained on: ``square`` or ``longest_side``.

    The ``config.json`` of a student or of its trunk names it. Without an entry, it is ``longest_side`` (aspect kept)
    for a SAM and ``square`` (stretched) for all other models.

    Raises:
        UserError: ``config.json`` names an unknown geometry.
    """
    return check_geometry(geometry_of(getattr(model, "config", None)))


def check_geometry(name: str) -> Literal["square", "longest_side"]:
    """Return ``name`` if it is a geometry. Raises ``UserError`` otherwise."""
    if name not in ("square", "longest_side"):
        raise UserError(f"unknown geometry {name!r}; give longest_side or square")
    return name  # type: ignore[return-value]
