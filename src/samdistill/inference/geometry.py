"""How images lie on a model's canvas: it belongs to the model, and is saved with it."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from transformers import SamModel

from ..data.transforms import Geometry
from ..ops.promptable import Promptable, image_size
from ..types import UserError


def canvas_of(model: Any, geometry: str | None = None) -> Geometry:
    """The canvas of a promptable model or a detector. geometry: None takes the model's own."""
    network, side = (model, image_size(model)) if isinstance(model, Promptable) else (model.model, model.image_size)
    return Geometry(side, own_geometry(network) if geometry is None else check_geometry(geometry))


def own_geometry(model: nn.Module) -> str:
    """How the model's training images lay on its canvas, ``square`` or ``longest_side``.

    A student has it in its ``config.json``, or in that of its trunk. Of other models a SAM's images keep their aspect,
    and a SAM 3's are stretched. Raises ``UserError`` for a ``config.json`` that names another one.
    """
    config: Any = getattr(model, "config", None)
    trunk = getattr(getattr(config, "vision_config", None), "backbone_config", None)
    found = next((name for part in (config, trunk) if (name := getattr(part, "geometry", None)) is not None), None)
    return check_geometry(found or ("longest_side" if isinstance(model, SamModel) else "square"))


def check_geometry(name: str) -> Literal["square", "longest_side"]:
    """Raises ``UserError`` for what is no geometry."""
    if name not in ("square", "longest_side"):
        raise UserError(f"no geometry is called {name!r}; there is: longest_side, square")
    return name  # type: ignore[return-value]
