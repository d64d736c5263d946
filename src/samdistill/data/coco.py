"""COCO instances: one JSON for many images, polygons and run-length masks, categories."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from pycocotools import mask as coco_mask
from pydantic import BaseModel

from ..reading import Table, fits, foreign, read_json, shown
from ..types import UserError
from .sources import SOURCES, BadImage, BadInput, Instance, Source, key_problem


def run_lengths(counts: str | bytes) -> Int[np.ndarray, " runs"]:
    """The run lengths behind COCO's compressed string: 5 bits a character, the rest differences to two runs before."""
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


def decode_segmentation(segmentation: Any, height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """A mask from COCO's three spellings: polygons, run lengths as a list, run lengths as a string.

    Raises ``ValueError`` for anything that is not one of them or does not fit ``height`` x ``width``.
    """
    if isinstance(segmentation, list):
        if not segmentation or not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation):
            raise ValueError("polygons need three x, y pairs or more each")
        runs = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation, dict) and "counts" in segmentation:
        if [int(s) for s in segmentation.get("size", [])] != [height, width]:
            raise ValueError(f"mask of size {segmentation.get('size')} on an image of {[height, width]}")
        listed = isinstance(segmentation["counts"], list)
        counts = segmentation["counts"]
        lengths = np.array(counts, np.int64) if listed else run_lengths(counts)  # SA-V lists floats
        # pycocotools would fill a mask whose runs are too short from uninitialised memory
        if lengths.sum() != height * width or lengths.min() < 0:
            raise ValueError(f"run lengths sum to {lengths.sum()}, not to {height} x {width}")
        whole = {"size": [height, width], "counts": lengths.tolist()}
        runs = coco_mask.frPyObjects(whole, height, width) if listed else segmentation
    else:
        raise ValueError(f"segmentation is neither polygons nor run lengths but {type(segmentation).__name__}")
    return coco_mask.decode(runs).astype(bool)


def _find(root: Path) -> dict[str | None, tuple[Path, Path]]:
    """Split name to annotation file and image folder; the name is None for a single ``instances.json``.

    ``instances_train2017.json`` is found as ``train2017`` and, where no other year competes, as ``train``.
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
    return found


class _File(BaseModel):
    """The parts of an instances file that are read; what each entry holds is looked at where it is used."""

    images: list[Table]
    annotations: list[Table]
    categories: list[Table]


@SOURCES.register("coco")
class CocoSource(Source):
    """``instances.json`` beside ``images/``, or ``annotations/instances_<split>.json`` with ``images/<split>`` or ``<split>``.

    Keys are file names without suffix. Images missing on disk, files missing in the JSON and annotations without an
    image or a usable outline are problems. An object is called by its category, or by every name in the annotation's
    list ``concepts`` where it has one.
    """  # noqa: E501

    labelled = True

    @classmethod
    def splits(cls, root: Path) -> list[str]:
        return sorted(name for name in _find(root) if name is not None)

    def __init__(self, root: Path, split: str | None) -> None:
        found = _find(root)
        if split not in found:
            raise UserError(f"{root}: neither instances.json nor annotations/instances_<split>.json is there")
        annotations, self.images = found[split]
        self.problems = []
        record = read_json(annotations, _File, "not a COCO instances file")
        with foreign(annotations, "not a COCO instances file"):
            self._categories = {c["id"]: str(c["name"]) for c in record.categories}
            self._records = self._match(record.images)
            self._objects = self._group(record.annotations)
        self.keys = sorted(self._records)

    def _match(self, images: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        on_disk = {p.name for p in self.images.glob("*") if p.is_file()}
        records: dict[str, dict[str, Any]] = {}
        for image in images:
            name = fits(image["file_name"], str)
            if reason := key_problem(name):  # before it is joined with a folder
                self.problems.append(BadInput(shown(name), reason))
                continue
            key = str(PurePosixPath(name).with_suffix(""))
            if not (name in on_disk or (self.images / name).is_file()):
                self.problems.append(BadInput(key, "listed in the JSON, but its image is missing"))
            elif key in records:
                self.problems.append(BadInput(key, f"listed twice in the JSON; id {image['id']} is left out"))
            else:
                records[key] = image
            on_disk.discard(name)
        self.problems += [BadInput(Path(n).stem, "image without an entry in the JSON") for n in sorted(on_disk)]
        return records

    def _group(self, annotations: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
        known = {record["id"] for record in self._records.values()}
        grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in annotations:
            label = f"annotation {annotation['id']}"
            if annotation["image_id"] not in known:
                self.problems.append(BadInput(label, f"its image {annotation['image_id']} is missing"))
            elif annotation["category_id"] not in self._categories:
                self.problems.append(BadInput(label, f"unknown category {annotation['category_id']}"))
            elif not annotation["segmentation"]:
                self.problems.append(BadInput(label, "has no segmentation"))
            else:
                grouped[annotation["image_id"]].append(annotation)
        return dict(grouped)

    def path(self, key: str) -> Path:
        return self.images / self._records[key]["file_name"]

    def _of(self, key: str) -> list[dict[str, Any]]:
        return self._objects.get(self._records[key]["id"], [])

    def instances(self, key: str) -> list[Instance]:
        """Objects in the JSON's order, crowds marked. Raises ``BadImage`` for an outline that cannot be drawn."""
        image = self._records[key]
        instances = []
        for a in self._of(key):
            try:
                mask = decode_segmentation(a["segmentation"], int(image["height"]), int(image["width"]))
            except (ValueError, KeyError, TypeError) as error:
                raise BadImage(key, f"annotation {a['id']}: {error}") from error
            instances.append(Instance(mask, self._categories[a["category_id"]], int(a["id"]), bool(a.get("iscrowd"))))
        return instances

    def boxes(self, key: str) -> Float[np.ndarray, "n 4"]:
        """From ``bbox``: no mask is decoded. Raises ``BadImage`` for an annotation without one."""
        boxes = []
        for a in self._of(key):
            if not a.get("iscrowd"):
                try:
                    x, y, width, height = (float(v) for v in a["bbox"])
                except (ValueError, KeyError, TypeError) as error:
                    raise BadImage(key, f"annotation {a['id']}: no usable bbox: {error!r}") from error
                boxes.append((x, y, x + width, y + height))
        return np.array(boxes, np.float32).reshape(-1, 4)

    def _names(self, annotation: dict[str, Any]) -> list[str]:
        return annotation.get("concepts") or [self._categories[annotation["category_id"]]]

    def phrases(self, key: str) -> list[str]:
        """Crowds count: what they are called is in the image."""
        return list(dict.fromkeys(name for a in self._of(key) for name in self._names(a)))

    @property
    def vocabulary(self) -> list[str]:
        """All categories, those that no image shows too; where annotations list ``concepts``, all of those."""
        if any(a.get("concepts") for objects in self._objects.values() for a in objects):
            return super().vocabulary
        return sorted(set(self._categories.values()))
