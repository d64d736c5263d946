"""Detect the layout of a folder of images or videos."""

from __future__ import annotations

from pathlib import Path

from ..config import DataConfig
from ..types import UserError
from . import Source, open_source
from .davis import LAYOUTS, DavisSource
from .masks import SPLITS, find_mask_folders
from .sav import KINDS


def data_kind(root: Path) -> str:
    """Detect the layout of a folder of images.

    Returns:
        ``coco``, ``masks`` (image and mask folders), ``sa1b`` (a tree, a flat folder or tar shards), or ``folder`` for
        images without annotations.

    Raises:
        UserError: ``root`` is not a folder.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of images")
    if any((root / "annotations").glob("instances*.json")) or any(root.glob("instances*.json")):
        return "coco"
    if find_mask_folders(root):
        return "masks"
    if (root / "images").is_dir() and (root / "annotations").is_dir():
        return "sa1b"
    if any(root.glob("sa_*.json")) or any(root.glob("sa_*.tar")):
        return "sa1b"
    return "folder"


def held_out_images(root: Path) -> Source:
    """Open the images to evaluate on: the ``val`` split, or all images if ``root`` has no splits."""
    kind = data_kind(root)
    return open_source(DataConfig(kind=kind, root=root, held_out_fraction=1.0), "held_out")


def video_kind(root: Path) -> str | None:
    """Detect the layout of a folder of videos, with or without the sub-folders ``train``, ``val`` and ``test``.

    Only file names are read. Images with masks may be in folders of the same names as DAVIS, but have no folder per
    video in them.

    Returns:
        ``sav``, ``davis`` or None.
    """
    kinds = (layout_of(folder) for folder in (root, *(root / name for name in SPLITS)))
    return next((kind for kind in kinds if kind is not None), None)


def layout_of(folder: Path) -> str | None:
    """Detect the layout of one folder without splits. SA-V is distributed in sub-folders, so one level below is
    included.
    """
    for pattern in ("*.mp4", "*/*.mp4"):
        for path in folder.glob(pattern):
            if any(path.with_name(f"{path.stem}_{kind}.json").is_file() for kind in KINDS):
                return "sav"
    if any((folder / images).is_dir() and (folder / masks).is_dir() for images, masks in LAYOUTS):
        # sub-folders that all have names of splits contain images, not frames of videos
        return None if set(DavisSource(folder).keys) <= set(SPLITS) else "davis"
    return None
