"""Read PNG files whose pixel values are object ids, and detect PNG files whose values cannot be ids."""

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
"""Value of an 8-bit id map that marks unlabelled border pixels if the map has other ids."""
_FEW, _MANY, _MOST, _SHADES = 3, 8, 0.75, 64
_ADVICE = (
    "draw masks without soft edges and do not scale them, or save a PNG per object in a folder of the image's name"
)

Ids = UInt[np.ndarray, "h w"]


def read_id_map(path: Path, size: Size | None = None) -> Ids:
    """Read the palette indices or grey values of a PNG.

    An RGB file is accepted if its three channels are equal, and an alpha channel if it is opaque.

    Args:
        path: The PNG file.
        size: Expected height and width, or None for any.

    Returns:
        Values of shape (h, w); uint8, or uint16 for a file of 16 bits.

    Raises:
        UserError: The file is not a PNG, is damaged, coloured, transparent or of another size.
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
    """List the object ids in a map, ascending.

    0 is background. In an 8-bit map 255 is left out if there are other ids.

    Raises:
        UserError: The values cannot be object ids (see ``drawn``).
    """
    refuse_drawing(path, ids)
    objects = found_ids(ids)
    return objects[:-1] if ids.dtype == np.uint8 and len(objects) > 1 and objects[-1] == VOID else objects


def refuse_drawing(path: Path, ids: Ids) -> None:
    """Raise ``UserError`` if the values cannot be object ids (see ``drawn``)."""
    if reason := drawn(ids):
        raise UserError(f"{path} holds no object ids: {reason}; {_ADVICE}")


def found_ids(ids: Ids) -> list[int]:
    """List the non-zero values of a map, ascending."""
    return [int(number) for number in np.flatnonzero(np.bincount(ids.ravel())) if number != 0]


def drawn(ids: Ids) -> str | None:
    """Return why the values of a map cannot be object ids, or None if they can.

    Three kinds of files are detected:

    - Soft edges. More than half of the non-zero values, and at least three, fill no 3 x 3 block, and at least 75 % of
      their pixels touch another non-zero value. Small objects fill no block either, but most of their pixels do not
      touch other objects. With fewer than eight values, a further condition is that some value fills a block and the
      values are not low numbers.
    - Shaded pictures. There are at least 64 non-zero values, and of the pairs of neighbouring pixels with different
      non-zero values at least 90 % differ by three or less.
    - 255 as an object. Beside other ids 255 marks borders. It cannot be a border if it covers more than half of the
      foreground and the other values are not low numbers.
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
    """Pair each pixel with its right, lower and two lower diagonal neighbours, as views."""
    return [
        (ids[:, :-1], ids[:, 1:]), (ids[:-1], ids[1:]), (ids[:-1, :-1], ids[1:, 1:]), (ids[:-1, 1:], ids[1:, :-1]),
    ]  # fmt: skip


def _inside(ids: Ids) -> Bool[np.ndarray, "h w"]:
    """Return the pixels whose eight neighbours have the same value."""
    inside = np.zeros(ids.shape, bool)
    if min(ids.shape) >= 3:
        middle, same = ids[1:-1, 1:-1], np.ones((ids.shape[0] - 2, ids.shape[1] - 2), bool)
        for down in range(3):
            for across in range(3):
                same &= ids[down : down + middle.shape[0], across : across + middle.shape[1]] == middle
        inside[1:-1, 1:-1] = same
    return inside


def _beside_another(ids: Ids) -> Bool[np.ndarray, "h w"]:
    """Return the pixels that touch a pixel of another value, where neither is background."""
    found = np.zeros(ids.shape, bool)
    for (one, other), (here, there) in zip(_shifted(ids), _shifted(found), strict=True):
        differ = (one != other) & (one != 0) & (other != 0)
        here |= differ  # ``here`` and ``there`` are views, so this writes to ``found``
        there |= differ
    return found


def _close_steps(ids: Ids) -> float:
    """Return the fraction of horizontally and vertically neighbouring, different non-zero values that differ by at most
    3.
    """
    steps, close = 0, 0
    for one, other in _shifted(ids)[:2]:
        gap = np.abs(one.astype(np.int32) - other.astype(np.int32))
        touching = (gap > 0) & (one != 0) & (other != 0)
        steps += int(touching.sum())
        close += int((touching & (gap <= 3)).sum())
    return close / steps if steps else 0.0
