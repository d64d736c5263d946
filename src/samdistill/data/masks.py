"""Image and mask folders: one PNG of ids per image, or a folder with one PNG per object."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from PIL import Image

from ..reading import foreign
from ..types import UserError
from .fingerprints import file_digest
from .folder import FolderSource
from .id_maps import object_ids, read_id_map
from .skipped import BadInput
from .sources import SOURCES, BadImage, Instance, Source
from .transforms import Size

PAIRS = (("images", "masks"), ("JPEGImages", "SegmentationObject"), ("JPEGImages", "Annotations"))
"""Folders of images and of their masks: this package's, Pascal VOC's (its ``Annotations`` are XML files), and DAVIS's.
"""
SPLITS = ("train", "val", "test")


def find_mask_folders(root: Path) -> dict[str | None, tuple[Path, Path]]:
    """Find the image and mask folders of each split.

    A split is ``<split>/images`` with ``<split>/masks``, or ``images/<split>`` with ``masks/<split>``. The second form
    is used only if ``images`` has no other sub-folder, because a video may be called ``train``, as in DAVIS.

    Returns:
        Split name to the folders of images and masks. The name is None if there are no splits. Empty if there are no
        such folders.
    """
    inside: dict[str | None, tuple[Path, Path]] = {}
    inside.update({name: pair for name in SPLITS if (pair := _pair(root / name)) is not None})
    if inside:
        return inside
    pair = _pair(root)
    if pair is None:
        return {}
    below = {p.name for p in pair[0].iterdir() if p.name[0] != "." and p.is_dir()}
    if below and below <= set(SPLITS):
        return {name: (pair[0] / name, pair[1] / name) for name in sorted(below)}
    return {None: pair}


def _pair(root: Path) -> tuple[Path, Path] | None:
    pairs = ((root / images, root / masks) for images, masks in PAIRS)
    return next(((images, masks) for images, masks in pairs if images.is_dir() and masks.is_dir()), None)


@SOURCES.register("masks")
class MaskFolderSource(Source):
    """Images in ``images/`` with masks in ``masks/``, or the folder names of Pascal VOC or DAVIS (``PAIRS``), without
    categories.

    The mask of ``images/a.jpg`` is the id map ``masks/a.png``, or the folder ``masks/a/`` with one PNG per object. In
    an id map each value is the id of an object: the palette index or grey value, 8 or 16 bits, not the colour. 0 is
    background. In 8 bits, 255 is Pascal VOC's border label if there are other ids, and an object if there are none,
    because binary masks are stored as 0 and 255. In a PNG per object every non-zero pixel is part of the object.

    Both folders may have sub-folders. A key is the path below the image folder without its suffix. An image without
    mask and a mask without image are reported in ``problems``.
    """

    labelled = True

    @classmethod
    def splits(cls, root: Path) -> list[str]:
        return sorted(name for name in find_mask_folders(root) if name is not None)

    def __init__(self, root: Path, split: str | None) -> None:
        found = find_mask_folders(root)
        if split not in found:
            raise UserError(f"{root}: neither images/ beside masks/ nor JPEGImages/ beside Annotations/ is there")
        self.images, self.masks = found[split]
        images, masks = FolderSource(self.images), FolderSource(self.masks)
        self.problems = images.problems + masks.problems
        self._names: dict[str, str] = {}
        for name in images.keys:
            first = self._names.setdefault(_stem(name), name)
            if first != name:
                self.problems.append(BadInput(name, f"has the same name as {first}, except for the suffix"))
        self._masks, self._objects = self._match(masks.keys)
        for key in sorted(self._names.keys() - self._masks.keys() - self._objects.keys()):
            self.problems.append(BadInput(key, "image without mask"))
        for key in sorted(self._masks.keys() & self._objects.keys()):
            self.problems.append(BadInput(key, "has both an id PNG and a folder of masks; keep one"))
        self.keys = sorted(self._masks.keys() ^ self._objects.keys())

    def _match(self, files: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
        """Return the id map of each image, and the object PNGs of each image sorted by name."""
        masks: dict[str, str] = {}
        objects: dict[str, list[str]] = {}
        for name in files:
            stem, folder = _stem(name), PurePosixPath(name).parent.as_posix()
            if stem not in self._names and folder not in self._names:
                self.problems.append(BadInput(name, "mask without image"))
            elif not name.lower().endswith(".png"):
                self.problems.append(BadInput(name, "a mask has to be a PNG: other formats do not keep ids exactly"))
            elif stem in self._names:
                masks[stem] = name
            else:
                objects.setdefault(folder, []).append(name)
        return masks, objects

    def path(self, key: str) -> Path:
        return self.images / self._names[key]

    def read_instances(self, key: str) -> list[Instance]:
        """Read the objects of an image, sorted by id.

        Objects in files of their own are sorted by file name and numbered from 1. Their masks may be empty.

        Raises:
            BadImage: A PNG cannot be read, is coloured, has another size than the upright image, or is not a map of
                ids.
        """
        size = self.check(key)
        try:
            if key in self._masks:
                path = self.masks / self._masks[key]
                ids = read_id_map(path, size)
                return [Instance(ids == number, None, number) for number in object_ids(path, ids)]
            files = enumerate(self._objects[key], 1)
            return [Instance(read_id_map(self.masks / name, size) != 0, None, number) for number, name in files]
        except UserError as error:
            raise BadImage(key, str(error)) from error

    def label_digest(self, key: str) -> bytes:
        files = [self._masks[key]] if key in self._masks else self._objects[key]
        return b"".join(file_digest(self.masks / name) for name in files)

    def annotated_size(self, key: str) -> tuple[str, Size]:
        """Return the size of the mask, or of the first of the object masks."""
        path = self.masks / (self._masks[key] if key in self._masks else self._objects[key][0])
        try:
            with foreign(path, "not a readable mask"), Image.open(path) as file:
                return str(path), (file.height, file.width)
        except UserError as error:
            raise BadImage(key, str(error)) from error


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
