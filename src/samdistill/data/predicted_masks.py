"""Folders of predicted and true video masks, in the layouts of the DAVIS and SA-V evaluators.

``<video>/<frame>.png`` is an id map of all objects. ``<video>/<object>/<frame>.png`` is the mask of one object,
non-zero where it is visible. Both folders have the same layout. Frames that are not scored need no prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt

from ..metrics.video import ObjectMasks
from ..metrics.video_frames import VOID, VideoConvention, first_frame_objects
from ..types import UserError
from .davis import LAYOUTS, RESOLUTIONS
from .division import read_keys
from .id_maps import read_id_map
from .sources import size_problem
from .transforms import Size

OFFICIAL_IDS = Path("ImageSets", "2017", "val.txt")
"""File that lists DAVIS's validation videos, which are in one folder with the others."""


@dataclass(frozen=True)
class MaskVideo:
    """True and predicted masks of one video.

    Attributes:
        name: Name of the video.
        truth: Folder of the true masks.
        predicted: Folder of the predicted masks.
        objects: Names of the folders per object; empty if one PNG holds all objects.
    """

    name: str
    truth: Path
    predicted: Path
    objects: tuple[str, ...]


def find_true_masks(root: Path) -> tuple[Path, Path | None]:
    """Find the folder with one sub-folder per video.

    Args:
        root: Root of DAVIS or SA-V (with ``Annotations/`` or ``Annotations_6fps/``, with or without a resolution
            below), or the folder itself.

    Returns:
        The folder, and the list of videos to score if ``root`` has one.

    Raises:
        UserError: ``root`` is not a folder.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of masks")
    listed = root / OFFICIAL_IDS
    for _, name in LAYOUTS:
        if (root / name).is_dir():
            folder = root / name
            inner = next((folder / r for r in RESOLUTIONS if (folder / r).is_dir()), folder)
            return inner, listed if listed.is_file() else None
    return root, None


def find_videos(results: Path, root: Path) -> tuple[list[MaskVideo], list[str]]:
    """Pair the true masks of each video with its predictions.

    Args:
        results: Folder of the predictions, one sub-folder per video.
        root: Folder of the true masks, as for ``find_true_masks``.

    Returns:
        The videos, and the names of sub-folders of ``results`` without true masks.

    Raises:
        UserError: A folder does not exist, or a video has no predictions.
    """
    truth, listed = find_true_masks(root)
    if not results.is_dir():
        raise UserError(f"{results}: no such folder of predicted masks")
    every = _folders(truth)
    names = every if listed is None else read_keys(listed, every)
    if not names:
        raise UserError(
            f"{truth}: holds no folder of a video; give <video>/<frame>.png or <video>/<object>/<frame>.png"
        )
    found = _folders(results)
    if missing := sorted(set(names) - set(found)):
        raise UserError(f"{results}: {len(missing)} of {len(names)} videos have no predictions, such as {missing[0]}/")
    videos = [MaskVideo(name, truth / name, results / name, tuple(_folders(truth / name))) for name in names]
    return videos, sorted(set(found) - set(every))


def object_masks(video: MaskVideo, convention: VideoConvention) -> Iterator[ObjectMasks]:
    """Read true and predicted masks of each object that is scored.

    Args:
        video: The video.
        convention: Evaluation convention, which selects frames and objects.

    Raises:
        UserError: A frame is missing or has another size, a PNG does not hold ids or one object, or the layout does not
            fit the convention.
    """
    if video.objects:
        if convention.from_first_frame:
            raise UserError(
                f"{video.truth}: has a folder per object, and {convention.name} takes PNGs with the ids of all "
                "objects; give --convention sav"
            )
        for name in video.objects:
            if not name.isdecimal():
                raise UserError(f"{video.truth / name}: the name of an object's folder is its number, such as 000")
            truth, predicted = _read_pair(video.truth / name, video.predicted / name, convention, one_object=True)
            yield ObjectMasks(int(name), range(len(truth)), truth != 0, predicted != 0)
        return
    truth, predicted = _read_pair(video.truth, video.predicted, convention, one_object=False)
    if convention.from_first_frame:
        truth[truth == VOID] = 0
        ids = first_frame_objects(number for number in np.unique(truth[0]).tolist() if number != 0)
        highest, most = int(predicted.max(initial=0)), max(ids, default=0)
        if highest > most:
            raise UserError(
                f"{video.predicted}: holds the id {highest}, and the first true mask has ids up to {most}; give "
                "objects the ids that they have there, and leave 255 out"
            )
    else:
        inner = truth[convention.inner(len(truth))]
        ids = [number for number in np.unique(inner).tolist() if number != 0]
    for number in ids:
        yield ObjectMasks(number, range(len(truth)), truth == number, predicted == number)


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name[0] != "." and path.is_dir())


def _read_pair(
    truth: Path, predicted: Path, convention: VideoConvention, one_object: bool
) -> tuple[UInt[np.ndarray, "t h w"], UInt[np.ndarray, "t h w"]]:
    """Read all true masks and the predicted masks of scored frames. Other predicted frames are zero."""
    names = sorted(path.name for path in truth.iterdir() if path.suffix.lower() == ".png" and path.name[0] != ".")
    if not names:
        raise UserError(f"{truth}: holds no PNG of a true mask")
    wanted = names[convention.inner(len(names))]
    if missing := [name for name in wanted if not (predicted / name).is_file()]:
        raise UserError(
            f"{predicted / missing[0]}: missing; {len(missing)} of {len(wanted)} scored frames have no prediction"
        )
    first = _read(truth / names[0], None, one_object)
    grids = [first, *(_read(truth / name, first.shape, one_object) for name in names[1:])]
    shown = [_read(predicted / name, first.shape, one_object) for name in wanted]
    found = np.zeros((len(names), *first.shape), np.uint16)
    if shown:
        found[convention.inner(len(names))] = shown
    return np.stack(grids), found


def _read(path: Path, size: Size | None, one_object: bool) -> UInt[np.ndarray, "h w"]:
    values = read_id_map(path)
    if size is not None and values.shape != size:
        raise UserError(size_problem(str(path), values.shape, size, "the first true mask of its video"))
    if one_object and (kinds := len(np.unique(values))) > 2:
        raise UserError(f"{path}: holds {kinds} values; in a folder per object a mask has two, background and object")
    return values
