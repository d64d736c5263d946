"""Exported folders among model folders. They are opened by ``export.opened``, which stands above this module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..reading import Table, read_json
from ..registry import Registry
from ..types import UserError

RECORD = "export.json"
PROMPTABLE = "promptable"
OPENERS: Registry[Callable[[Path], Any]] = Registry("kind of exported model", "samdistill.deployment.opened")
"""Functions that open an exported folder, by the ``kind`` in its ``export.json``."""


def exported_kind(place: Path) -> str | None:
    """Return the kind of an exported model (``promptable``, ``detector`` or ``detector with memory``).

    None for any other folder or file.

    Raises:
        UserError: ``export.json`` cannot be read.
    """
    path = place / RECORD
    if not path.is_file():
        return None
    return str(read_json(path, Table, "not a readable record of an export").get("kind"))


def open_exported(place: Path, wanted: str, image_size: int | None) -> Any:
    """Open an exported folder.

    Args:
        place: The folder.
        wanted: ``promptable`` or ``detector``.
        image_size: Side of the input in pixels, or None for the exported one. The files have no other.

    Raises:
        UserError: The model is of the other kind, the size is another one, or a file is missing or damaged.
    """
    kind = exported_kind(place) or ""
    if kind.partition(" ")[0] != wanted and kind in OPENERS:
        other = "takes points and boxes only" if kind == PROMPTABLE else "takes phrases and example boxes only"
        raise UserError(f"{place}: an exported {kind} {other}; give a {wanted} model")
    model, own = OPENERS.get(kind)(place)
    if image_size not in (None, own):
        raise UserError(
            f"{place}: exported for images of {own} px; export it with --image-size {image_size} for others"
        )
    return model
