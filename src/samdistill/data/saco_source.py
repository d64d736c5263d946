"""SA-Co files as training data: images with phrases, and the masks of the objects that each phrase names."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path, PurePosixPath

import numpy as np
from pycocotools import mask as coco_mask

from ..types import UserError
from .phrases import plain
from .saco import ConceptPair, ConceptSet, Rle
from .skipped import BadInput
from .sources import SOURCES, Instance, Source
from .transforms import Size


def _files(root: Path) -> dict[str | None, Path]:
    """Find the file of each split. The name is None for a single ``concepts.json``."""
    folders = (root, root / "annotations")
    single = next((folder / "concepts.json" for folder in folders if (folder / "concepts.json").is_file()), None)
    if single is not None:
        return {None: single}
    found = (path for folder in reversed(folders) for path in sorted(folder.glob("concepts_*.json")))
    return {path.stem.removeprefix("concepts_"): path for path in found}


@SOURCES.register("saco")
class SacoSource(Source):
    """Pairs of an image and a phrase in the layout of SA-Co, with the masks of the phrase's objects.

    The files are ``concepts_<split>.json`` or ``concepts.json``, in ``root`` or in ``root/annotations``. A key is the
    ``file_name`` of an image without its suffix. The phrases of an image are those of its pairs with an object. A pair
    without any is a phrase that is known to be absent. Of all other phrases it is not known.

    Pairs that ``ConceptSet`` leaves out, such as those that are not exhaustively annotated, are reported in
    ``problems`` and never asked.
    """

    labelled = True

    @classmethod
    def splits(cls, root: Path) -> list[str]:
        return sorted(name for name in _files(root) if name is not None)

    def __init__(self, root: Path, split: str | None) -> None:
        """Read the file of a split.

        Args:
            root: Folder of the data set.
            split: One of ``splits(root)``, or None for a single ``concepts.json``.

        Raises:
            UserError: There is no such file, or it is damaged or has no usable pair.
        """
        found = _files(root)
        if split not in found:
            raise UserError(f"{root}: neither concepts.json nor concepts_<split>.json is there")
        self.file = found[split]
        pairs = ConceptSet.load(self.file)
        self.problems = list(pairs.problems)
        self._paths: dict[str, Path] = {}
        self._pairs: dict[str, dict[str, list[ConceptPair]]] = {}
        files: dict[str, str] = {}
        for pair in pairs.pairs:
            key = str(PurePosixPath(pair.file_name).with_suffix(""))
            if files.setdefault(key, pair.file_name) != pair.file_name:
                self.problems.append(BadInput(pair.file_name, f"has the same stem as {files[key]}"))
                continue
            self._paths[key] = pairs.path(pair)
            self._pairs.setdefault(key, {}).setdefault(plain(pair.text), []).append(pair)
        self.keys = sorted(self._paths)

    def path(self, key: str) -> Path:
        return self._paths[key]

    def _all(self, key: str) -> list[ConceptPair]:
        return [pair for pairs in self._pairs[key].values() for pair in pairs]

    def annotated_size(self, key: str) -> tuple[str, Size]:
        """Return ``height`` and ``width`` of the first pair. Masks of other sizes are refused when they are read."""
        first = self._all(key)[0]
        return f"its entry in {self.file.name}", (first.height, first.width)

    def read_instances(self, key: str) -> list[Instance]:
        """Read the objects of all pairs. An object that two phrases name is read twice."""
        found = []
        for text, pairs in self._pairs[key].items():
            for pair in pairs:
                for number, (rle, crowd) in enumerate(_drawn(pair)):
                    mask = np.ascontiguousarray(coco_mask.decode(rle)).astype(bool)
                    found.append(Instance(mask, None, f"{pair.id}/{number}", crowd, (text,)))
        return found

    def label_digest(self, key: str) -> bytes:
        return json.dumps([asdict(pair) for pair in self._all(key)], sort_keys=True).encode()

    def phrases(self, key: str) -> list[str]:
        """Return the phrases with an object."""
        return [text for text, pairs in self._pairs[key].items() if any(pair.rles for pair in pairs)]

    def absent(self, key: str) -> list[str]:
        """Return the phrases of the pairs without objects."""
        return [text for text, pairs in self._pairs[key].items() if not any(map(_drawn, pairs))]

    def complete(self, key: str, phrase: str) -> bool:
        """Return whether the phrase has a pair in the image, without groups."""
        pairs = self._pairs[key].get(phrase, [])
        return bool(pairs) and not any(pair.groups for pair in pairs)

    @property
    def vocabulary(self) -> list[str]:
        """Phrases of all pairs, sorted."""
        return sorted({text for key in self.keys for text in self._pairs[key]})


def _drawn(pair: ConceptPair) -> list[tuple[Rle, bool]]:
    """Return the masks of a pair, and whether each is a group."""
    return [*((rle, False) for rle in pair.rles), *((rle, True) for rle in pair.groups)]
