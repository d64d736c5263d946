"""Where images come from: the interface of a data set, decoding, splits and reproducible subsets."""

from __future__ import annotations

import hashlib
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps

from ..config import DataConfig
from ..names import key_problem as key_problem  # of every source, whose modules import it from here
from ..ops.masks import masks_to_boxes
from ..registry import Registry, did_you_mean
from ..types import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# What Pillow's decoders raise on broken files; anything else is a fault of this package and must surface.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, OverflowError, struct.error,
                 zlib.error, Image.DecompressionBombError)  # fmt: skip


class BadInput(NamedTuple):
    """An input that was left out, and why. Counted and listed, never lost."""

    key: str
    reason: str


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
    id: int
    crowd: bool = False


class Source(ABC):
    """A set of images with unique keys, and their objects where there are labels.

    keys: sorted. problems: what listing found unusable. labelled: whether ``instances`` can return anything.
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

    @abstractmethod
    def instances(self, key: str) -> list[Instance]:
        """Annotated objects, in the file's order; [] without labels. Raises ``BadImage`` for a broken annotation."""

    def boxes(self, key: str) -> Float[np.ndarray, "n 4"]:
        """xyxy of each annotated object in pixels of the file, edge to edge; crowds are left out."""
        masks = [torch.from_numpy(i.mask) for i in self.instances(key) if not i.crowd]
        return masks_to_boxes(torch.stack(masks)).numpy() if masks else np.zeros((0, 4), np.float32)

    def phrases(self, key: str) -> list[str]:
        """What the data set calls the objects of the image, each name once; [] where it has no names."""
        return []

    @property
    def vocabulary(self) -> list[str]:
        """Every name that ``phrases`` can give, sorted."""
        return sorted({phrase for key in self.keys for phrase in self.phrases(key)})

    def load(self, key: str) -> Image.Image:
        """RGB, upright (EXIF applied), fully decoded. Raises ``BadImage`` for a corrupt or missing file."""
        try:
            return read_image(self.path(key))
        except DECODE_ERRORS as error:
            raise BadImage(key, f"{self.path(key)} is not a readable image: {one_line(error)}") from error


SOURCES: Registry[type[Source]] = Registry("data set kind")


def one_line(error: BaseException) -> str:
    """What an error says, or its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def read_image(path: Path) -> Image.Image:
    """Decode to upright 8-bit RGB.

    Grey is repeated, 16-bit is scaled by 1/257, transparency is laid over white, CMYK converted. JPEGs are always
    decoded at full size: Pillow's ``draft`` would make a view depend on how the file was encoded. Corruption inside
    a JPEG's entropy-coded data is not reported by libjpeg and decodes to wrong pixels; everything else raises one of
    ``DECODE_ERRORS``.
    """
    with Image.open(path) as file:
        file.load()
        image: Image.Image = file
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except (*DECODE_ERRORS, KeyError, AttributeError):
            image.info.pop("exif", None)  # broken metadata around good pixels: no orientation is known
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image.copy() if getattr(image, "fp", None) is not None else image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            values = np.nan_to_num(values) * (255.0 if values.max(initial=0) <= 1 else 1.0)
        elif values.max(initial=0) > 255 or image.mode != "I":
            values = values / 257
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


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
