"""Where images come from: the interface of a data set, decoding, splits and reproducible subsets."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
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
from .fingerprints import combined, file_digest
from .images import UnreadableImage, one_line, read_image, upright_size
from .skipped import BadInput, leave_out
from .transforms import Size


class BadImage(UserError):
    """One image, or its annotation, cannot be read."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.bad = BadInput(key, reason)

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return type(self), tuple(self.bad)


class Instance(NamedTuple):
    """One annotated object. ``mask`` is in the pixels of the image file; a crowd covers several objects at once."""

    mask: Bool[np.ndarray, "h w"]
    category: str | None
    id: int | str
    crowd: bool = False


class Source(ABC):
    """A set of images with unique keys, and their objects where there are labels.

    keys: sorted. problems: what listing found unusable. labelled: whether ``instances`` can return anything.
    What an image and its annotation have to meet is checked here, for all jobs and verbs.
    """

    keys: list[str]
    problems: list[BadInput]
    labelled: bool

    @classmethod
    @abstractmethod
    def splits(cls, root: Path) -> list[str]:
        """Names of the parts that ``root`` is divided into on disk; empty where it is one undivided set."""

    @abstractmethod
    def __init__(self, root: Path, split: str | None) -> None:
        """List one of ``splits(root)``, or with None an undivided root. Reads no image."""

    @abstractmethod
    def path(self, key: str) -> Path:
        """The image file."""

    def read_instances(self, key: str) -> list[Instance]:
        """Annotated objects, in the file's order; [] without labels. Raises ``BadImage`` for a broken annotation.

        For ``instances``, which callers ask.
        """
        return []

    def read_boxes(self, key: str) -> Float[np.ndarray, "n 4"]:
        """For ``boxes``, which callers ask; here, from the masks."""
        masks = [torch.from_numpy(i.mask) for i in self.instances(key) if not i.crowd]
        return masks_to_boxes(torch.stack(masks)).numpy() if masks else np.zeros((0, 4), np.float32)

    def annotated_size(self, key: str) -> tuple[str, Size] | None:
        """What gives a height and width for the image, and which; None where nothing does. Raises ``BadImage``."""
        return None

    def check(self, key: str) -> Size:
        """Height and width of the upright image; no pixel is decoded.

        Raises ``BadImage`` for a file that is no image, and for an annotation of another size: such an annotation lies
        elsewhere than what it is about.
        """
        try:
            return self._fitting(key, upright_size(self.path(key)))
        except UnreadableImage as error:
            raise BadImage(key, str(error)) from error

    def _fitting(self, key: str, size: Size) -> Size:
        said = self.annotated_size(key)
        if said is not None and said[1] != size:
            raise BadImage(key, size_problem(*said, size))
        return size

    def instances(self, key: str) -> list[Instance]:
        """Annotated objects, in the file's order, their masks as large as the upright image; [] without labels.

        Raises ``BadImage`` for a broken annotation and for one of another size than the image.
        """
        if not self.labelled:
            return []
        size, found = self.check(key), self.read_instances(key)
        for instance in found:
            if instance.mask.shape != size:
                raise BadImage(key, size_problem(f"its mask {instance.id}", instance.mask.shape, size))
        return found

    def boxes(self, key: str) -> Float[np.ndarray, "n 4"]:
        """xyxy of each annotated object in pixels of the file, edge to edge; crowds are left out. Raises as above."""
        self.check(key)
        return self.read_boxes(key)

    def label_digest(self, key: str) -> bytes:
        """What changes where the annotation does. Raises ``OSError``."""
        return b""

    def fingerprint(self, key: str, labels: bool = False) -> str:
        """16 hex digits over what the image file holds, and with ``labels`` its annotation. Raises ``OSError``."""
        return combined([file_digest(self.path(key)), self.label_digest(key) if labels else b""])

    def phrases(self, key: str) -> list[str]:
        """What the data set calls the objects of the image, each name once; [] where it has no names."""
        return []

    @property
    def vocabulary(self) -> list[str]:
        """Every name that ``phrases`` can give, sorted."""
        return sorted({phrase for key in self.keys for phrase in self.phrases(key)})

    def load(self, key: str) -> Image.Image:
        """RGB, upright (EXIF applied), fully decoded.

        Raises ``BadImage`` for a corrupt or missing file, and for an annotation of another size: all jobs leave out
        the same images.
        """
        try:
            image = read_image(self.path(key))
        except UnreadableImage as error:
            raise BadImage(key, str(error)) from error
        self._fitting(key, (image.height, image.width))
        return image


def size_problem(what: str, said: Size, size: Size, of: str = "its image") -> str:
    """What is wrong with an annotation of ``said`` height and width for an image of ``size``."""
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


def key_share(key: str, salt: str) -> float:
    """A number in [0, 1) that depends on the key and the salt alone, the same on every platform."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{key}".encode()).digest()[:8], "big") / 2**64


def subset(keys: Collection[str], fraction: float) -> list[str]:
    """About ``fraction`` of the keys, at least one, sorted. A smaller fraction's keys lie inside a larger one's."""
    if fraction >= 1 or not keys:
        return sorted(keys)
    return _below(keys, fraction, "subset") or [min(keys, key=lambda key: key_share(key, "subset"))]


def split_keys(keys: Collection[str], fraction: float) -> tuple[list[str], list[str]]:
    """Training and held-out keys, sorted; ``fraction`` is held out by hash, so more files move no key.

    With two keys or more and 0 < fraction < 1 both sides get at least one.
    """
    held_out = set(_below(keys, fraction, "split"))
    if len(keys) > 1 and 0 < fraction < 1:
        ordered = sorted(keys, key=lambda key: key_share(key, "split"))
        held_out.add(ordered[0])
        if len(held_out) == len(keys):
            held_out.remove(ordered[-1])
    return sorted(set(keys) - held_out), sorted(held_out)


def _below(keys: Collection[str], fraction: float, salt: str) -> list[str]:
    return sorted(key for key in keys if key_share(key, salt) < fraction)


def read_keys(path: Path, known: Collection[str]) -> list[str]:
    """Sorted keys of a text file with one a line. Raises ``UserError`` for an empty file and a key not ``known``."""
    try:
        wanted = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.ids: cannot read {path}: {one_line(error)}") from None
    unknown = sorted(wanted - set(known))
    if unknown:
        some = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        like = f"; keys look like {min(known)!r}" if known else ""
        raise UserError(f"{path}: {len(unknown)} of {len(wanted)} ids are not in the data set: {some}{like}")
    if not wanted:
        raise UserError(f"{path}: holds no id; write one key a line")
    return sorted(wanted)


def _open(data: DataConfig, name: str, names: list[str]) -> Source:
    """One part of ``root``, which has ``names`` on disk; with no names, all of it."""
    kind = SOURCES.get(data.kind)
    if names and name not in names:
        raise UserError(f"{data.root}: has no split {name!r}{did_you_mean(name, names)}")
    source = kind(data.root, name if names else None)
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
    """The images to train on, or those to evaluate on; the two never overlap.

    A root that is divided on disk gives ``data.split`` and ``data.held_out``. An undivided one, or
    ``held_out`` None, is divided by key hash with ``held_out_fraction``. ``held_out_last`` divides the training split
    of any root instead: the last so many of its sorted keys are held out. ``ids`` choose among all training images
    (before such a division); ``fraction`` thins the training images alone.
    Raises ``UserError`` for a missing or empty root, an unknown kind, split or id, and a division with an empty side.
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
    """The source, after its images were held against their annotations; what does not pass is left out when it is read.

    No pixel is decoded. Of more than ``most`` images so many are looked at, spread over all.
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
    """``count`` items spread over the whole sequence (photographs next to each other are alike); None takes all."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
