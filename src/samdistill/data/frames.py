"""Videos as folders of frames: which files they are, in which order, and what is missing between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path, PurePath
from typing import NamedTuple

from ..types import UserError
from .images import IMAGE_SUFFIXES, unread
from .skipped import BadInput

_NUMBER = re.compile(r"(\d+)")
_Key = tuple[str | int, ...]


class Frames(NamedTuple):
    """names: of the frames' files in natural order, ``2.jpg`` before ``10.jpg``. problems: files that look like frames
    and are not read, and holes in the numbering."""

    names: tuple[str, ...]
    problems: tuple[BadInput, ...]


def natural(name: str) -> _Key:
    """What sorts names by the numbers in them; texts and numbers in turn."""
    return tuple(int(part) if place % 2 else part for place, part in enumerate(_NUMBER.split(name)))


def list_frames(folder: Path, key: str) -> Frames:
    """The frames of the video called ``key``.

    Raises ``UserError`` for a folder without a frame, and where two frames have the same number.
    """
    files = [path.name for path in folder.iterdir() if path.name[0] != "."]
    problems = [BadInput(f"{key}/{name}", reason) for name in sorted(files) if (reason := unread(name))]
    stems = [(natural(PurePath(name).stem), name) for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    stems.sort()
    if not stems:
        left_out = f"; {problems[0].key}: {problems[0].reason}" if problems else ""
        raise UserError(f"{folder} holds no frame{left_out}")
    for (first, one), (second, other) in pairwise(stems):
        if first == second:
            raise UserError(f"{folder} has two frames of the same name or number, {one} and {other}; remove one")
    problems += _holes(key, [stem for stem, _ in stems], [name for _, name in stems])
    return Frames(tuple(name for _, name in stems), tuple(problems))


def _holes(key: str, keys: Sequence[_Key], names: Sequence[str]) -> list[BadInput]:
    """What is missing between frames whose names differ in their last number alone, counted in their smallest step."""
    if any(len(one) == 1 for one in keys) or len({(one[:-2], one[-1]) for one in keys}) != 1:
        return []
    numbers = [int(one[-2]) for one in keys]
    gaps = [after - before for before, after in pairwise(numbers)]
    step = min(gaps, default=1)
    lost = sum(-(-gap // step) - 1 for gap in gaps)
    if not lost:
        return []
    place = next(place for place, gap in enumerate(gaps) if gap > step)
    why = f"missing in the numbering, {lost} in all; the frames that are there are taken to follow one another"
    return [BadInput(f"{key}, frame after {names[place]}", why)]
