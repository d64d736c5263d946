"""PNGs whose values are object ids: reading them, which values are objects, and drawings that are no such thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt
from PIL import Image

from ..reading import foreign
from ..types import UserError
from .sources import size_problem
from .transforms import Size

VOID = 255
_FEW, _MANY, _MOST, _SHADES = 3, 8, 0.75, 64
_ADVICE = (
    "draw masks without soft edges and do not scale them, or save a PNG per object in a folder of the image's name"
)

Ids = UInt[np.ndarray, "h w"]


def read_id_map(path: Path, size: Size | None = None) -> Ids:
    """Indices of a palette, or grey values; grey written as colour counts. size: of the image it belongs to.

    Raises ``UserError`` for a file that is no PNG or broken, for colours, transparency and another size.
    """
    with foreign(path, "not a readable mask"):
        values = _decoded(path)
    if size is not None and values.shape != size:
        raise UserError(size_problem(str(path), values.shape, size))
    return values


def _decoded(path: Path) -> Ids:
    with Image.open(path) as file:
        if file.format != "PNG":
            raise ValueError(f"it is a {file.format} file, not a PNG")
        file.load()
        mode, values = file.mode, np.asarray(file)
    if mode in ("LA", "RGBA"):
        if values[..., -1].min(initial=255) < 255:
            raise ValueError("it is transparent; a mask is a palette or grey PNG")
        values = values[..., :-1]
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise ValueError("it is coloured; a mask is a palette or grey PNG")
        values = values[..., 0]
    return values.astype(np.uint8 if values.dtype in (np.bool_, np.uint8) else np.uint16)


def object_ids(path: Path, ids: Ids) -> list[int]:
    """Non-zero values that are there, ascending; not 255 in 8 bits beside another.

    Raises ``UserError`` where the values are no ids, as ``drawn`` says.
    """
    refuse_drawing(path, ids)
    objects = found_ids(ids)
    return objects[:-1] if ids.dtype == np.uint8 and len(objects) > 1 and objects[-1] == VOID else objects


def refuse_drawing(path: Path, ids: Ids) -> None:
    """Raises ``UserError`` where values are no ids, and says what to do."""
    if reason := drawn(ids):
        raise UserError(f"{path} holds no object ids: {reason}; {_ADVICE}")


def found_ids(ids: Ids) -> list[int]:
    """Non-zero values that are there, ascending."""
    return [int(number) for number in np.flatnonzero(np.bincount(ids.ravel())) if number != 0]


def drawn(ids: Ids) -> str | None:
    """Why values cannot be object ids but are the greys of a drawing, or None where they can.

    - Soft edges: more than half of the values, three at least, fill no block of 3 x 3 pixels anywhere, and their pixels
      lie against other values. Small objects fill no block either, but lie apart. Fewer than eight values have to be
      greys, not low numbers, around one that fills a block.
    - A shaded picture: of 64 values or more, nine in ten pixels that lie against another value differ from it by three
      at most.
    - 255 is taken for a border beside other ids. It is none where it covers most of what is not background and the
      others are no low numbers.
    """
    found = found_ids(ids)
    if len(found) < 2:
        return None
    edges = ids != 0
    solid = set(found_ids(np.where(_inside(ids), ids, 0)))
    thin = [number for number in found if number not in solid]
    greys = found[-1] > 4 * len(found) + 16
    if 2 * len(thin) > len(found) and len(thin) >= _FEW and (len(found) >= _MANY or (solid and greys)):
        pixels = np.isin(ids, thin)
        if (pixels & _beside_another(ids)).sum() >= _MOST * pixels.sum():
            return f"{len(thin)} of its {len(found)} values are thin edges, as of a mask that was drawn with soft edges"
    if len(found) >= _SHADES and _close_steps(ids) >= 0.9:
        return f"its {len(found)} values pass into one another, as in a shaded picture"
    others = [number for number in found if number != VOID]
    if ids.dtype == np.uint8 and found[-1] == VOID and others[-1] > 4 * len(others) + 16:
        covered = int((ids == VOID).sum())
        if 2 * covered > int(edges.sum()):
            listed = ", ".join(map(str, others[:5]))
            return f"beside other ids ({listed}) 255 is a border, but it covers most of what is not background"
    return None


def _shifted(ids: Ids) -> list[tuple[Ids, Ids]]:
    """Each pixel and its right, lower and two diagonal neighbours, as pairs of views."""
    return [
        (ids[:, :-1], ids[:, 1:]), (ids[:-1], ids[1:]), (ids[:-1, :-1], ids[1:, 1:]), (ids[:-1, 1:], ids[1:, :-1]),
    ]  # fmt: skip


def _inside(ids: Ids) -> Bool[np.ndarray, "h w"]:
    """Pixels whose eight neighbours have their value."""
    inside = np.zeros(ids.shape, bool)
    if min(ids.shape) >= 3:
        middle, same = ids[1:-1, 1:-1], np.ones((ids.shape[0] - 2, ids.shape[1] - 2), bool)
        for down in range(3):
            for across in range(3):
                same &= ids[down : down + middle.shape[0], across : across + middle.shape[1]] == middle
        inside[1:-1, 1:-1] = same
    return inside


def _beside_another(ids: Ids) -> Bool[np.ndarray, "h w"]:
    """Pixels with a neighbour of another value that is not background."""
    found = np.zeros(ids.shape, bool)
    for (one, other), (here, there) in zip(_shifted(ids), _shifted(found), strict=True):
        differ = (one != other) & (one != 0) & (other != 0)
        here |= differ  # views: this marks the pixels of ``found``
        there |= differ
    return found


def _close_steps(ids: Ids) -> float:
    """Of pixels that lie against another value, background apart, the share that differ by three at most."""
    steps, close = 0, 0
    for one, other in _shifted(ids)[:2]:
        gap = np.abs(one.astype(np.int32) - other.astype(np.int32))
        touching = (gap > 0) & (one != 0) & (other != 0)
        steps += int(touching.sum())
        close += int((touching & (gap <= 3)).sum())
    return close / steps if steps else 0.0
