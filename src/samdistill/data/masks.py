"""Image + mask folders: an id PNG per image, or a folder with one PNG per object."""

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
"""Folders of images and of their masks: ours, Pascal VOC's (whose ``Annotations`` are XML), and DAVIS'."""
SPLITS = ("train", "val", "test")


def find_mask_folders(root: Path) -> dict[str | None, tuple[Path, Path]]:
    """Split name to the folders of images and masks; the name is None for an undivided set. Empty where none is there.

    A split is ``<split>/images`` beside ``<split>/masks``, or ``images/<split>`` beside ``masks/<split>``. The second
    form holds only where ``images`` has no other folder: a video may be called ``train``, as one of DAVIS is.
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
    """``images/`` beside ``masks/``, or ``JPEGImages/`` beside ``Annotations/``, with sub-folders at will. No classes.

    The mask of ``images/a.jpg`` is ``masks/a.png``, whose values are object ids, or ``masks/a/``, whose every PNG is
    one object wherever it is not zero. Ids are what a palette or grey PNG of 8 or 16 bits holds, not its colours; 0 is
    background. In 8 bits 255 is Pascal VOC's border that belongs to no object where the file has other ids, and the
    object where it has none: so are binary masks written.
    Keys are paths below the image folder without suffix. What has no counterpart of its name is a problem, not a key.
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
                self.problems.append(BadInput(name, f"{first} has the same name but for its suffix"))
        self._masks, self._objects = self._match(masks.keys)
        for key in sorted(self._names.keys() - self._masks.keys() - self._objects.keys()):
            self.problems.append(BadInput(key, "image without mask"))
        for key in sorted(self._masks.keys() & self._objects.keys()):
            self.problems.append(BadInput(key, "has both an id PNG and a folder of masks; keep one"))
        self.keys = sorted(self._masks.keys() ^ self._objects.keys())

    def _match(self, files: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
        """Id PNG of each image, and PNGs of its objects in the order of their names."""
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
        """Objects by id, or in the order of their files' names and numbered from 1; a file may hold no pixel.

        Raises ``BadImage`` for a PNG that cannot be read, is coloured, is not as large as its upright image, or is a
        drawing instead of a map of ids.
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
        """Its mask's, or that of the first of them."""
        path = self.masks / (self._masks[key] if key in self._masks else self._objects[key][0])
        try:
            with foreign(path, "not a readable mask"), Image.open(path) as file:
                return str(path), (file.height, file.width)
        except UserError as error:
            raise BadImage(key, str(error)) from error


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
