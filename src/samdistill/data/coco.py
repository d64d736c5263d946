"""COCO instance annotations: one JSON for many images, polygons and run-length masks, categories."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from pycocotools import mask as coco_mask
from pydantic import BaseModel

from ..reading import Table, Whole, fits, foreign, misfit, read_json, shown
from ..types import UserError
from .federated import Verified, file_name, lvis_files, spoken
from .images import IMAGE_SUFFIXES, unread
from .skipped import BadInput
from .sources import SOURCES, BadImage, Instance, Source, key_problem
from .transforms import Size

_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError)

OVERHANG = 2.0
"""Pixels by which polygons and boxes may extend beyond their image, because annotation tools round coordinates."""


def run_lengths(counts: str | bytes) -> Int[np.ndarray, " runs"]:
    """Decode COCO's compressed run-length string.

    A character holds 5 bits of a number. From the fourth run on, the number is the difference to the run two places
    before.

    Args:
        counts: The field ``counts`` of a compressed mask.

    Returns:
        Run lengths, int64, beginning with the background.

    Raises:
        ValueError: The string is damaged.

    Source: ``rleFrString`` in the COCO API (``common/maskApi.c``).
    """
    code = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    if not len(code) or code.min() < 0 or code.max() > 63 or code[-1] & 32:
        raise ValueError("run-length string is damaged")
    last = np.flatnonzero(code & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    if (last - first).max() > 8:  # 9 characters hold 45 bits
        raise ValueError("run-length string is damaged")
    place = np.arange(len(code)) - np.repeat(first, last - first + 1)
    values = np.add.reduceat((code & 31) << (5 * place), first)
    values -= np.where(code[last] & 16, 1 << (5 * (last - first + 1)), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Check a COCO segmentation against the image size without decoding it.

    Args:
        segmentation: Polygons, run lengths as a list, or run lengths as a compressed string. Polygons may extend
            ``OVERHANG`` pixels beyond the image.
        height: Height of the image.
        width: Width of the image.

    Raises:
        ValueError: The segmentation has none of these forms, or does not fit the image.
    """
    if isinstance(segmentation, list):
        if not segmentation or not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation):
            raise ValueError("polygons need three x, y pairs or more each")
        for polygon in segmentation:
            if not math.isfinite(sum(polygon)):
                raise ValueError("a polygon has a coordinate that is not finite")
            box = min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2])
            _require_inside("a polygon", box, height, width)
    elif isinstance(segmentation, dict) and "counts" in segmentation:
        if segmentation.get("size") not in ([height, width], (height, width)):
            raise ValueError(f"mask of size {segmentation.get('size')} on an image of {[height, width]}")
        counts = segmentation["counts"]
        lengths = np.array(counts, np.int64) if isinstance(counts, list) else run_lengths(counts)  # SA-V has floats
        # if the run lengths are too short, pycocotools fills the rest of the mask from uninitialised memory
        if lengths.sum() != height * width or lengths.min() < 0:
            raise ValueError(f"run lengths sum to {lengths.sum()}, not to {height} x {width}")
    else:
        raise ValueError(f"segmentation is neither polygons nor run lengths but {type(segmentation).__name__}")


def _require_inside(what: str, box: tuple[float, float, float, float], height: int, width: int) -> None:
    """Raise ``ValueError`` if a box, xyxy, extends more than ``OVERHANG`` pixels beyond the image."""
    left, top, right, bottom = box
    if min(left, top) < -OVERHANG or right > width + OVERHANG or bottom > height + OVERHANG:
        corners = ", ".join(f"{value:g}" for value in box)
        raise ValueError(f"{what} reaches outside the image of {width} x {height} pixels: {corners}")


def decode_segmentation(segmentation: Any, height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """Decode a COCO segmentation to a boolean mask.

    Args:
        segmentation: As for ``check_segmentation``.
        height: Height of the image.
        width: Width of the image.

    Returns:
        Mask of shape (h, w).

    Raises:
        ValueError: As for ``check_segmentation``.
    """
    check_segmentation(segmentation, height, width)
    if isinstance(segmentation, list):
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))).astype(bool)
    if isinstance(segmentation["counts"], list):
        whole = {"size": [height, width], "counts": [int(number) for number in segmentation["counts"]]}
        return coco_mask.decode(coco_mask.frPyObjects(whole, height, width)).astype(bool)
    return coco_mask.decode(segmentation).astype(bool)


def _find(root: Path) -> dict[str | None, tuple[Path, Path]]:
    """Find the annotation file and the image folder of each split.

    The name of the split is None for a single ``instances.json``. ``instances_train2017.json`` is the split
    ``train2017``, and also ``train`` if there is no other year.
    """
    if (root / "instances.json").is_file():
        return {None: (root / "instances.json", root / "images" if (root / "images").is_dir() else root)}
    found: dict[str | None, tuple[Path, Path]] = {}
    short = defaultdict(list)
    for path in sorted((root / "annotations").glob("instances_*.json")):
        name = path.stem.removeprefix("instances_")
        folders = [root / "images" / name, root / name, root / "images"]
        found[name] = path, next((f for f in folders if f.is_dir()), folders[0])
        short[re.sub(r"20\d\d$", "", name)].append(name)
    found.update({name: found[years[0]] for name, years in short.items() if len(years) == 1})
    return found | lvis_files(root)


class _File(BaseModel):
    """The fields of an instances file that are read. Their entries are checked where they are used."""

    images: list[Table]
    annotations: list[Table]
    categories: list[Table]


class _Annotation(BaseModel):
    """The required fields of an annotation. Its segmentation is checked separately."""

    id: Whole | str | None = None
    image_id: Whole | str
    category_id: Whole | str
    concepts: list[str] | None = None


@SOURCES.register("coco")
class CocoSource(Source):
    """COCO instance annotations.

    The files are ``instances.json`` with ``images/``, or ``annotations/instances_<split>.json`` with
    ``images/<split>/`` or ``<split>/``. A key is the file name of an image without its suffix. Ids are numbers or
    texts, and ``1`` differs from ``"1"``.

    Images missing on disk, files missing in the JSON and annotations without an image are reported in ``problems``. An
    annotation whose segmentation is invalid, or whose segmentation or box is outside its image, is reported too, and
    only that object is left out. The phrase of an object is the name of its category, or every name in the annotation's
    list ``concepts`` if it has one.

    LVIS has ``annotations/lvis_<split>.json`` and COCO's folders of images (``train2017/``) in ``images/`` or beside
    ``annotations/``. Its keys are paths without suffix.
    """

    labelled = True

    @classmethod
    def splits(cls, root: Path) -> list[str]:
        return sorted(name for name in _find(root) if name is not None)

    def __init__(self, root: Path, split: str | None) -> None:
        """List the images of a split and read its annotation file.

        Args:
            root: Folder of the data set.
            split: One of ``splits(root)``, or None for a single ``instances.json``.

        Raises:
            UserError: The file is damaged or not a COCO instances file, an id is used twice, or ids mix numbers and
                texts.
        """
        found = _find(root)
        if split not in found:
            raise UserError(f"{root}: neither instances.json nor annotations/instances_<split>.json is there")
        self.file, self.images = found[split]
        self.problems = []
        record = read_json(self.file, _File, "not a COCO instances file")
        with foreign(self.file, "not a COCO instances file"):
            for image in record.images:
                image["file_name"] = file_name(image)
            _refuse_shared(self.file, "image", [(i["id"], i["file_name"]) for i in record.images])
            _refuse_shared(self.file, "category", [(c["id"], str(c["name"])) for c in record.categories])
            self._categories = {c["id"]: str(c["name"]) for c in record.categories}
            self._verified = Verified(record.images, {c: spoken(name) for c, name in self._categories.items()})
            self._records, self._lost = self._match(record.images), defaultdict[Any, dict[str, bool]](dict)
            self._objects = self._group(record.annotations, {image["id"] for image in record.images})
        self.keys = sorted(self._records)

    def _match(self, images: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        on_disk = {p.name for p in self.images.glob("*") if p.is_file()}
        records: dict[str, dict[str, Any]] = {}
        for image in images:
            name = fits(image["file_name"], str)
            if reason := key_problem(name):  # checked before the name is used in a path
                self.problems.append(BadInput(shown(name), reason))
                continue
            key = str(PurePosixPath(name).with_suffix(""))
            if not (name in on_disk or (self.images / name).is_file()):
                self.problems.append(BadInput(key, "listed in the JSON, but its image is missing"))
            elif key in records:
                if image != records[key]:
                    first = records[key]["file_name"]
                    why = "listed twice in the JSON" if first == name else f"{first} and {name} have the same stem"
                    self.problems.append(BadInput(key, f"{why}; id {image['id']} is left out"))
            else:
                records[key] = image
            on_disk.discard(name)
        self.problems += [BadInput(n, reason) for n in sorted(on_disk) if (reason := unread(n))]
        strangers = sorted(name for name in on_disk if name.lower().endswith(IMAGE_SUFFIXES))
        self.problems += [BadInput(Path(n).stem, "image without an entry in the JSON") for n in strangers]
        return records

    def _group(self, annotations: list[dict[str, Any]], listed: Collection[Any]) -> dict[Any, list[dict[str, Any]]]:
        keys = {record["id"]: key for key, record in self._records.items()}
        grouped: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for number, annotation in enumerate(annotations):
            label = f"annotation {shown(annotation.setdefault('id', number))}"
            if reason := misfit(annotation, _Annotation):
                self.problems.append(BadInput(label, reason))
                continue
            image, category = annotation["image_id"], annotation["category_id"]
            _refuse_other_type(self.file, "image_id", image, listed)
            _refuse_other_type(self.file, "category_id", category, self._categories)
            if image not in keys:
                self.problems.append(BadInput(label, f"its image {image} is missing"))
            elif category not in self._categories:
                self.problems.append(BadInput(f"{keys[image]}, {label}", f"unknown category {category}"))
            elif reason := _object_problem(annotation, _size(self._records[keys[image]])):
                self.problems.append(BadInput(f"{keys[image]}, {label}", reason))
                self._lost[image].update(dict.fromkeys(self._names(annotation), not annotation.get("segmentation")))
            else:
                grouped[image].append(annotation)
        return dict(grouped)

    def path(self, key: str) -> Path:
        return self.images / self._records[key]["file_name"]

    def annotated_size(self, key: str) -> tuple[str, Size] | None:
        """Return ``height`` and ``width`` of the image's entry, if it has them."""
        size = _size(self._records[key])
        return None if size is None else (f"its entry in {self.file.name}", size)

    def _of(self, key: str) -> list[dict[str, Any]]:
        return self._objects.get(self._records[key]["id"], [])

    def read_instances(self, key: str) -> list[Instance]:
        """Read the objects in the order of the JSON, including crowds.

        Raises:
            BadImage: A segmentation cannot be decoded.
        """
        height, width = self.check(key)
        instances = []
        for a in self._of(key):
            try:
                mask = decode_segmentation(a["segmentation"], height, width)
            except _MALFORMED as error:
                raise BadImage(key, f"annotation {a['id']}: {error}") from error
            category, crowd = self._categories[a["category_id"]], bool(a.get("iscrowd"))
            instances.append(Instance(mask, category, a["id"], crowd, tuple(self._names(a))))
        return instances

    def read_boxes(self, key: str) -> Float[np.ndarray, "n 4"]:
        """Read the boxes from ``bbox``, clipped to the image, without decoding masks.

        If an object has no ``bbox``, all boxes are derived from masks.
        """
        objects = [a for a in self._of(key) if not a.get("iscrowd")]
        if any("bbox" not in a for a in objects):
            return super().read_boxes(key)
        height, width = self.check(key)
        boxes = [_corners(a["bbox"]) for a in objects]
        return np.array(boxes, np.float32).reshape(-1, 4).clip(0, (width, height, width, height)).astype(np.float32)

    def label_digest(self, key: str) -> bytes:
        return json.dumps(self._of(key), sort_keys=True).encode()

    def _names(self, annotation: dict[str, Any]) -> list[str]:
        return annotation.get("concepts") or [self._verified.names[annotation["category_id"]]]

    def phrases(self, key: str) -> list[str]:
        """Return the names of the objects, including those of crowds, because a crowd shows objects of its name."""
        return list(dict.fromkeys(name for a in self._of(key) for name in self._names(a)))

    def absent(self, key: str) -> list[str] | None:
        return self._verified.absent(self._records[key], self.phrases(key))

    def complete(self, key: str, phrase: str) -> bool:
        """Return False for a phrase with a crowd, or with an object that was left out, and where LVIS says so."""
        record = self._records[key]
        own = [a for a in self._of(key) if phrase in self._names(a)]
        if phrase in self._lost.get(record["id"], ()) or any(a.get("iscrowd") for a in own):
            return False
        return self._verified.complete(record, phrase, bool(own))

    def unmasked(self, key: str) -> set[str]:
        return {name for name, unmasked in self._lost.get(self._records[key]["id"], {}).items() if unmasked}

    @property
    def vocabulary(self) -> list[str]:
        """Phrases that can be asked, sorted.

        These are all categories, also those without objects. If any annotation has ``concepts``, they are the names
        that occur.
        """
        if any(a.get("concepts") for objects in self._objects.values() for a in objects):
            return super().vocabulary
        return sorted(set(self._verified.names.values()))


def _size(image: dict[str, Any]) -> Size | None:
    if "height" not in image or "width" not in image:
        return None
    return int(image["height"]), int(image["width"])


def _corners(bbox: Any) -> tuple[float, float, float, float]:
    x, y, width, height = (float(value) for value in bbox)
    return x, y, x + width, y + height


def _object_problem(annotation: dict[str, Any], size: Size | None) -> str | None:
    """Return why an annotation cannot be used, or None.

    Args:
        annotation: The annotation.
        size: Height and width of its image. If None, nothing is compared with it.
    """
    if not annotation.get("segmentation"):
        return "has no segmentation"
    try:
        if size is not None:
            check_segmentation(annotation["segmentation"], *size)
        if "bbox" in annotation:
            box = _corners(annotation["bbox"])
            if not all(map(math.isfinite, box)) or box[2] < box[0] or box[3] < box[1]:
                return f"its bbox {annotation['bbox']} is not x, y, width, height"
            if size is not None:
                _require_inside("its bbox", box, *size)
    except _MALFORMED as error:
        return str(error)
    return None


def _refuse_shared(file: Path, what: str, entries: Iterable[tuple[Any, str]]) -> None:
    """Raise ``UserError`` if an id has two names, because references to it would be ambiguous."""
    seen: dict[Any, str] = {}
    for identity, name in entries:
        if seen.setdefault(identity, name) != name:
            raise UserError(
                f"{file}: {what} id {identity!r} is used for {seen[identity]!r} and {name!r}; give each its own id "
                "(were two files joined?)"
            )


def _refuse_other_type(file: Path, field: str, identity: Any, known: Collection[Any]) -> None:
    """Raise ``UserError`` if an id is unknown but exists as the other type (``1`` and ``"1"``)."""
    other = str(identity) if isinstance(identity, int) else identity
    if isinstance(identity, str):
        other = int(identity) if identity.isdecimal() else None
    if identity not in known and other is not None and other != identity and other in known:
        raise UserError(
            f"{file}: {field} {identity!r} is not listed, but {other!r} is; write both as numbers or both as texts"
        )
