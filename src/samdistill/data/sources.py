"""Image data sets: the interface of a data set, decoding, splits and reproducible subsets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image

from ..config import DataConfig
from ..names import key_problem as key_problem
from ..ops.masks import masks_to_boxes
from ..registry import Registry, did_you_mean
from ..types import UserError
from .division import read_keys, split_keys, subset
from .fingerprints import combined, file_digest
from .images import UnreadableImage, read_image, upright_size
from .members import InputFile
from .skipped import BadInput, leave_out
from .transforms import Size


class BadImage(UserError):
    """An image or its annotation cannot be read. ``bad`` holds its key and the reason."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.bad = BadInput(key, reason)

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return type(self), tuple(self.bad)


class Instance(NamedTuple):
    """One annotated object.

    Attributes:
        mask: Boolean mask (h, w) in pixels of the upright image.
        category: Name of the category, or None if the data set has none.
        id: Id of the annotation, unique in the image.
        crowd: The mask covers a group of objects (COCO's ``iscrowd``).
        names: Phrases for the object, as in ``Source.phrases``.
    """

    mask: Bool[np.ndarray, "h w"]
    category: str | None
    id: int | str
    crowd: bool = False
    names: tuple[str, ...] = ()


class Source(ABC):
    """Base class of image data sets. Subclasses list their keys and read annotations by key.

    The size of an image and its annotation are compared here, so every job and command leaves out the same images.

    Attributes:
        keys: Unique keys of the images, sorted.
        problems: Inputs that were found unusable when the data set was listed.
        labelled: Whether the data set has masks. ``instances`` returns an empty list if it has none.
    """

    keys: list[str]
    problems: list[BadInput]
    labelled: bool

    @classmethod
    @abstractmethod
    def splits(cls, root: Path) -> list[str]:
        """Return the names of the splits in ``root``, or an empty list if it is not divided."""

    @abstractmethod
    def __init__(self, root: Path, split: str | None) -> None:
        """List the images of a split without reading them.

        Args:
            root: Folder of the data set.
            split: One of ``splits(root)``, or None if there are none.
        """

    @classmethod
    def open(cls, data: DataConfig, split: str | None) -> Source:
        """List a split of ``data.root``. Subclasses with settings of their own take them from ``data``."""
        return cls(data.root, split)

    @abstractmethod
    def path(self, key: str) -> Path:
        """Return the path of the image file."""

    def image_file(self, key: str) -> InputFile:
        """Return the image file, which a subclass may have in a shard. The default is ``path``.

        Images, sizes and fingerprints are read through it.
        """
        return self.path(key)

    def read_instances(self, key: str) -> list[Instance]:
        """Read the annotated objects in the order of the file. The default has none.

        Subclasses implement this method. Callers use ``instances``, which also checks the size of the masks.

        Raises:
            BadImage: The annotation is damaged.
        """
        return []

    def read_boxes(self, key: str) -> Float[np.ndarray, "n 4"]:
        """Read the boxes of the objects. The default derives them from the masks.

        Subclasses may override this method. Callers use ``boxes``.
        """
        masks = [torch.from_numpy(i.mask) for i in self.instances(key) if not i.crowd]
        return masks_to_boxes(torch.stack(masks)).numpy() if masks else np.zeros((0, 4), np.float32)

    def annotated_size(self, key: str) -> tuple[str, Size] | None:
        """Return the image size that the annotation states, or None if it states none.

        Returns:
            The name of what states the size, for messages, and the height and width.

        Raises:
            BadImage: The annotation is damaged.
        """
        return None

    def check(self, key: str) -> Size:
        """Return height and width of the upright image. No pixel is decoded.

        Raises:
            BadImage: The file is not a readable image, or its annotation is for another image size.
        """
        try:
            return self._fitting(key, upright_size(self.image_file(key)))
        except UnreadableImage as error:
            raise BadImage(key, str(error)) from error

    def _fitting(self, key: str, size: Size) -> Size:
        said = self.annotated_size(key)
        if said is not None and said[1] != size:
            raise BadImage(key, size_problem(*said, size))
        return size

    def instances(self, key: str) -> list[Instance]:
        """Read the annotated objects of an image in the order of the file.

        Returns:
            Objects whose masks have the size of the upright image; an empty list without labels.

        Raises:
            BadImage: The annotation is damaged, or its size differs from the image's.
        """
        if not self.labelled:
            return []
        size, found = self.check(key), self.read_instances(key)
        for instance in found:
            if instance.mask.shape != size:
                raise BadImage(key, size_problem(f"its mask {instance.id}", instance.mask.shape, size))
        return found

    def boxes(self, key: str) -> Float[np.ndarray, "n 4"]:
        """Read the bounding boxes of the annotated objects, without crowds.

        Returns:
            Boxes (n, 4), float32, xyxy in pixels of the upright image, at the outer edges of the objects' pixels.

        Raises:
            BadImage: As for ``instances``.
        """
        self.check(key)
        return self.read_boxes(key)

    def label_digest(self, key: str) -> bytes:
        """Return bytes that change when the annotation of the image changes. The default has no annotation.

        Raises:
            OSError: The annotation cannot be read.
        """
        return b""

    def fingerprint(self, key: str, labels: bool = False) -> str:
        """Return 16 hexadecimal digits computed from the image file.

        Args:
            key: Key of the image.
            labels: Include the annotation.

        Raises:
            OSError: A file cannot be read.
        """
        return combined([file_digest(self.image_file(key)), self.label_digest(key) if labels else b""])

    def phrases(self, key: str) -> list[str]:
        """Return the names of the objects in the image, each once. Empty if the data set has no names."""
        return []

    def absent(self, key: str) -> list[str] | None:
        """Return the phrases that are known to be absent from the image. None for all that ``phrases`` lacks."""
        return None

    def complete(self, key: str, phrase: str) -> bool:
        """Return whether all objects of a phrase are annotated. If there is none, whether it is known to be absent."""
        return True

    def unmasked(self, key: str) -> set[str]:
        """Return the phrases of annotated objects that were left out because they have no mask."""
        return set()

    @property
    def vocabulary(self) -> list[str]:
        """Phrases that can be asked, sorted. The default has those of all images."""
        return sorted({phrase for key in self.keys for phrase in self.phrases(key)})

    def load(self, key: str) -> Image.Image:
        """Decode an image to upright RGB (EXIF orientation applied).

        Raises:
            BadImage: The file is missing or damaged, or its annotation is for another image size.
        """
        try:
            image = read_image(self.image_file(key))
        except UnreadableImage as error:
            raise BadImage(key, str(error)) from error
        self._fitting(key, (image.height, image.width))
        return image


def size_problem(what: str, said: Size, size: Size, of: str = "its image") -> str:
    """Describe a mismatch between the size of an annotation and the size of its image.

    The text names EXIF orientation as the likely cause if exchanging height and width would make the sizes equal.

    Args:
        what: Name of the annotation.
        said: Height and width of the annotation.
        size: Height and width of the image.
        of: Name of the image.
    """
    (height, width), (h, w) = said, size
    text = f"{what} is {width} x {height} pixels, {of} {w} x {h}"
    if said == size[::-1]:
        return (
            f"{text}: with its sides swapped it fits, as if it was made before the image was turned upright; annotate "
            "the upright image, or remove the orientation from the image's EXIF data"
        )
    return f"{text}: give the image that was annotated, or annotate this one"


T = TypeVar("T")
SOURCES: Registry[type[Source]] = Registry("data set kind")


def _open(data: DataConfig, name: str, names: list[str]) -> Source:
    """List one split of ``root``, whose splits are ``names``; all images if there are no splits."""
    kind = SOURCES.get(data.kind)
    if names and name not in names:
        raise UserError(f"{data.root}: has no split {name!r}{did_you_mean(name, names)}")
    source = kind.open(data, name if names else None)
    if not source.keys:
        left_out = f"; {len(source.problems)} inputs were unusable" if source.problems else ""
        first = f", first {source.problems[0].key}: {source.problems[0].reason}" if source.problems else ""
        raise UserError(f"{data.root}: no image for data.kind={data.kind}{left_out}{first}")
    leave_out(source.problems, seen_by_all=True)
    return source


def _divide(data: DataConfig, keys: list[str]) -> tuple[list[str], list[str]]:
    last = data.held_out_last
    if last is None:
        return split_keys(keys, data.held_out_fraction)
    if last >= len(keys):
        raise UserError(f"{data.root}: data.held_out_last={last} of {len(keys)} images leaves none to train on")
    return keys[:-last], keys[-last:]


def open_source(data: DataConfig, split: Literal["train", "held_out"]) -> Source:
    """Open the training images or the images to evaluate on. The two never overlap.

    If ``root`` has splits, ``data.split`` is the training split and ``data.held_out`` the other. Without splits, or if
    ``data.held_out`` is None, the images are divided by a hash of the key, and ``held_out_fraction`` of them are held
    out. ``held_out_last`` replaces both: the last n of the sorted keys of the training split are held out. ``ids``
    selects among the images before the division. ``fraction`` selects a subset of the training images only.

    Args:
        data: The ``data`` block of a configuration.
        split: ``train`` or ``held_out``.

    Raises:
        UserError: The root is missing or empty, the kind, the split or an id is unknown, or one side of the division
            has no image.
    """
    if not data.root.is_dir():
        raise UserError(f"data.root: {data.root} is not a folder")
    names = SOURCES.get(data.kind).splits(data.root)
    held_out_split = data.held_out if names and data.held_out_last is None else None
    if held_out_split == data.split:
        raise UserError(f"data.held_out: {data.held_out!r} is also the training split; name another, or null")
    if split == "held_out" and held_out_split is not None:
        return _open(data, held_out_split, names)
    source = _open(data, data.split, names)
    if data.ids is not None:
        source.keys = read_keys(data.ids, source.keys)
    if held_out_split is None:
        train, held_out = _divide(data, source.keys)
        source.keys = train if split == "train" else held_out
        if not source.keys:
            raise UserError(f"{data.root}: {len(train) + len(held_out)} images with data.held_out_fraction="
                            f"{data.held_out_fraction:g} leave none for {split}")  # fmt: skip
    if split == "train":
        source.keys = subset(source.keys, data.fraction)
    return source


def survey(source: Source, most: int = 1000) -> Source:
    """Compare images with the sizes of their annotations and report those that differ.

    No pixel is decoded. The images stay in ``source.keys``; they are left out when they are read.

    Args:
        source: The images.
        most: Largest number of images to check; of more, evenly spaced ones are checked.

    Returns:
        ``source``.
    """
    found = []
    for key in source.keys[:: max(1, -(-len(source.keys) // most))]:
        try:
            source.check(key)
        except BadImage as error:
            found.append(error.bad)
    leave_out(found)
    return source


def evenly(items: Sequence[T], count: int | None) -> list[T]:
    """Select ``count`` evenly spaced items, because neighbouring images are often similar. None selects all."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
