"""Folders of video frames: list the files, sort them naturally and report gaps in their numbers."""

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
    """The frames of one video.

    Attributes:
        names: File names of the frames in natural order (``2.jpg`` before ``10.jpg``).
        problems: Files in image formats that are not read, and gaps in the frame numbers.
    """

    names: tuple[str, ...]
    problems: tuple[BadInput, ...]


def natural(name: str) -> _Key:
    """Return a sort key that compares the digits in a name as numbers.

    Even elements are text, odd elements are integers.

    Example:
        >>> sorted(["10.jpg", "2.jpg"], key=natural)
        ['2.jpg', '10.jpg']
    """
    return tuple(int(part) if place % 2 else part for place, part in enumerate(_NUMBER.split(name)))


def list_frames(folder: Path, key: str) -> Frames:
    """List the frames of a video that is stored as a folder of images.

    Args:
        folder: The folder. Hidden files and files that are not images are ignored.
        key: The video's key, used to name problems.

    Raises:
        UserError: The folder has no frame, or two frames have the same name or number.
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
    """Report frames that are missing in the numbering.

    Only names that differ in nothing but their last number are compared. The smallest difference between neighbours is
    taken as the regular step.
    """
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
