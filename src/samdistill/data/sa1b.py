"""SA-1B: one ``sa_<id>.jpg`` and one ``sa_<id>.json`` with run-length masks per image."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from ..config import DataConfig
from ..reading import Table, parse_json
from ..types import UserError
from .coco import decode_segmentation
from .fingerprints import file_digest
from .images import IMAGE_SUFFIXES, unread
from .members import InputFile
from .shards import ShardFiles, has_shards
from .skipped import BadInput
from .sources import SOURCES, BadImage, Instance, Source, key_problem
from .transforms import Size

JPEG_SUFFIXES = (".jpg", ".jpeg")
T = TypeVar("T")


class _ExtractedFiles:
    """Pairs of an image and its JSON in one or two folders, with the interface of ``ShardFiles``."""

    def __init__(self, images: Path, annotations: Path) -> None:
        self._folders = images, annotations
        names = sorted(_files(images), reverse=True)
        self._names = {Path(n).stem: n for n in names if n.lower().endswith(IMAGE_SUFFIXES)}
        found = set(self._names)
        jsons = {Path(n).stem for n in _files(annotations) if n.endswith(".json")}
        self.problems = [BadInput(n, reason) for n in names if (reason := unread(n))]
        self.problems += [BadInput(k, "image without its JSON") for k in sorted(found - jsons)]
        self.problems += [BadInput(k, "JSON without its image") for k in sorted(jsons - found)]
        both = sorted(found & jsons)
        self.problems += [BadInput(repr(k), reason) for k in both if (reason := key_problem(k))]
        self.keys = [k for k in both if key_problem(k) is None]

    def image(self, key: str) -> Path:
        return self._folders[0] / self._names[key]

    def annotation(self, key: str) -> Path:
        return self._folders[1] / f"{key}.json"


@SOURCES.register("sa1b")
class Sa1bSource(Source):
    """SA-1B images and masks.

    The files are in ``images/<split>/`` and ``annotations/<split>/``, all in one folder without splits, or in the tar
    shards of one folder (``ShardFiles``). A key is the file name of an image without its suffix. An image without JSON
    and a JSON without image are reported in ``problems``.
    """

    labelled = True

    @classmethod
    def splits(cls, root: Path) -> list[str]:
        return sorted(p.name for p in (root / "images").glob("*") if p.is_dir() and p.name[0] != ".")

    @classmethod
    def open(cls, data: DataConfig, split: str | None) -> Sa1bSource:
        return cls(data.root, split, data.index, data.shards)

    def __init__(self, root: Path, split: str | None, index: Path | None = None, shards: Path | None = None) -> None:
        """List the images of a split, and make the index of shards that have none.

        Args:
            root: Folder of the data set.
            split: One of ``splits(root)``, or None if there are none.
            index: Folder of the index of shards, as in ``ShardFiles``.
            shards: List of links that names the shards to use. None uses all.

        Raises:
            UserError: ``root`` has shards and extracted files, or ``shards`` is given and there are no shards; and as
                for ``ShardFiles``.
        """
        self._owner = object()
        self._found: ShardFiles | _ExtractedFiles
        if split is None and has_shards(root):
            self._found = ShardFiles(root, index, shards)
        elif shards is not None:
            raise UserError(f"data.shards: {root} has no tar shards; leave data.shards out, or give their folder")
        elif split is None:
            self._found = _ExtractedFiles(root, root)
        else:
            self._found = _ExtractedFiles(root / "images" / split, root / "annotations" / split)
        self.keys, self.problems = self._found.keys, self._found.problems

    def path(self, key: str) -> Path:
        """Return the path of an extracted image.

        Raises:
            UserError: The image is in a shard.
        """
        file = self._found.image(key)
        if isinstance(file, Path):
            return file
        raise UserError(f"{file}: is in a shard; extract the shards with: samdistill prepare sa1b")

    def image_file(self, key: str) -> InputFile:
        return self._found.image(key)

    def annotated_size(self, key: str) -> tuple[str, Size]:
        """Return the size in the field ``image`` of the JSON."""

        def read(record: dict[str, Any]) -> Size:
            return int(record["image"]["height"]), int(record["image"]["width"])

        return f"{key}.json", self._read(key, read)

    def read_instances(self, key: str) -> list[Instance]:
        """Read every mask of the image's JSON. Objects have no categories.

        Raises:
            BadImage: The JSON or one of its masks is damaged.
        """

        def read(record: dict[str, Any]) -> list[Instance]:
            height, width = int(record["image"]["height"]), int(record["image"]["width"])
            return [
                Instance(decode_segmentation(a["segmentation"], height, width), None, int(a["id"]))
                for a in record["annotations"]
            ]

        return self._read(key, read)

    def read_boxes(self, key: str) -> Float[np.ndarray, "n 4"]:
        """Read the boxes from ``bbox`` without decoding masks.

        SA-1B's width and height end at the last pixel. Here 1 is added, so that boxes end at its outer edge.
        """

        def read(record: dict[str, Any]) -> Float[np.ndarray, "n 4"]:
            boxes = np.array([a["bbox"] for a in record["annotations"]], np.float32).reshape(-1, 4)
            return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:] + 1], 1)

        return self._read(key, read)

    def label_digest(self, key: str) -> bytes:
        return file_digest(self._found.annotation(key))

    def _read(self, key: str, read: Callable[[dict[str, Any]], T]) -> T:
        file = self._found.annotation(key)
        try:
            return read(_parsed(file, self._owner))
        except Exception as error:  # invalid values can raise any exception
            raise BadImage(key, f"{file} is not a readable SA-1B annotation: {error!r}") from error


@lru_cache(1)
def _parsed(file: InputFile, owner: object) -> Any:
    """Parse a JSON file and keep the last one, because its size and its masks are read one after the other."""
    return parse_json(file.read_bytes(), Table)


def _files(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [e.name for e in entries if e.name[0] != "." and e.is_file()]
