"""Which of the known layouts a folder of images or of videos has."""

from __future__ import annotations

from pathlib import Path

from ..config import DataConfig
from ..types import UserError
from . import Source, open_source
from .davis import LAYOUTS, DavisSource
from .masks import SPLITS, find_mask_folders
from .sav import KINDS


def data_kind(root: Path) -> str:
    """Which of the known layouts a folder has: COCO, image + mask folders, an SA-1B tree, or just images."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of images")
    if any((root / "annotations").glob("instances*.json")) or any(root.glob("instances*.json")):
        return "coco"
    if find_mask_folders(root):
        return "masks"
    if ((root / "images").is_dir() and (root / "annotations").is_dir()) or any(root.glob("sa_*.json")):
        return "sa1b"
    return "folder"


def held_out_images(root: Path) -> Source:
    """Every image of an undivided folder; of a divided one the ``val`` part."""
    kind = data_kind(root)
    return open_source(DataConfig(kind=kind, root=root, held_out_fraction=1.0), "held_out")


def video_kind(root: Path) -> str | None:
    """Which layout of videos a folder has, undivided or in ``train/`` and ``val/``: ``sav``, ``davis`` or None.

    Only names are looked at. Images with masks have the folders of DAVIS too, but no folder per video in them.
    """
    kinds = (layout_of(folder) for folder in (root, *(root / name for name in SPLITS)))
    return next((kind for kind in kinds if kind is not None), None)


def layout_of(folder: Path) -> str | None:
    """Of one folder; SA-V is packed in sub-folders, so these belong to it."""
    for pattern in ("*.mp4", "*/*.mp4"):
        for path in folder.glob(pattern):
            if any(path.with_name(f"{path.stem}_{kind}.json").is_file() for kind in KINDS):
                return "sav"
    if any((folder / images).is_dir() and (folder / masks).is_dir() for images, masks in LAYOUTS):
        # sub-folders that are all called as parts are those of images
        return None if set(DavisSource(folder).keys) <= set(SPLITS) else "davis"
    return None
