"""Concept data sets in the layout of SA-Co: pairs of an image and a noun phrase with the masks of its objects.

A ground-truth file is a COCO file in which every entry of ``images`` is a pair with a ``text_input``. Several pairs may
have the same ``file_name``. As in the official evaluation (facebookresearch/sam3, ``sam3/eval/cgf1_eval.py``), an
annotation with ``iscrowd`` is not an object, and annotations with a ``category_id`` that is not listed are ignored.

Source: Carion et al., SAM 3, 2025.
"""

from __future__ import annotations

import math
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask

from .. import reading
from ..io import write_json
from ..names import key_problem
from ..types import UserError
from .coco import decode_segmentation, run_lengths
from .skipped import BadInput

Rle = dict[str, Any]
"""COCO's compressed run-length encoding: ``size`` [height, width] and ``counts``, a string."""
Box = tuple[float, float, float, float]
"""COCO's ``bbox``: x, y, width, height. Fractions of the image in SA-Co, pixels in COCO."""
CATEGORY = 1
"""SA-Co's only category, used for annotations and predictions without a category."""


@dataclass(frozen=True)
class ConceptPair:
    """An image, a phrase, and the objects that the phrase describes in the image.

    Attributes:
        id: Id of the pair.
        file_name: Path of the image as in the file.
        text: The phrase.
        height: Height of the image and of each mask in pixels.
        width: Width of the image and of each mask in pixels.
        rles: Masks of the objects; empty for a negative pair.
        boxes: Boxes of the objects as in the file; None for an object without a box.
        groups: Masks of groups (``iscrowd``), which are not objects.
        others: The same pair as annotated by further annotators.
    """

    id: int
    file_name: str
    text: str
    height: int
    width: int
    rles: tuple[Rle, ...]
    boxes: tuple[Box | None, ...] = ()
    groups: tuple[Rle, ...] = ()
    others: tuple[ConceptPair, ...] = ()


def to_rle(mask: Bool[np.ndarray, "h w"]) -> Rle:
    """Encode a mask as compressed run lengths."""
    runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode("ascii")}


def runs_of(segmentation: Any, height: int, width: int) -> Rle:
    """Convert any COCO segmentation to compressed run lengths.

    Raises:
        ValueError: The segmentation is invalid or does not fit the image.
    """
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    if isinstance(counts, str) and segmentation.get("size") == [height, width]:
        lengths = run_lengths(counts)
        if lengths.min() >= 0 and lengths.sum() == height * width:  # already compressed
            return {"size": [height, width], "counts": counts}
    try:
        return to_rle(decode_segmentation(segmentation, height, width))
    except ValueError:
        raise
    except Exception as error:  # invalid values can raise any exception
        raise ValueError(f"segmentation cannot be read: {error!r}") from error


def field_of(entry: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return ``entry[name]``.

    Raises:
        ValueError: The field is missing or not of type ``kind``. A boolean is not accepted as a number.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where}: {name!r} is {reprlib.repr(value)}, not {wanted}")
    return value


def category_of(entry: Mapping[str, Any], where: str) -> int:
    """Return the category id of an annotation or a prediction.

    Raises:
        ValueError: It is not an integer.
    """
    return field_of({"category_id": CATEGORY} | entry, "category_id", int, where)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: The file cannot be read or is not JSON.
    """
    return reading.read_json(path, Any, "not a readable JSON file")


def _read_pairs(entries: Any) -> dict[int, ConceptPair]:
    """Read the pairs by id, without objects, in the order of the file."""
    pairs: dict[int, ConceptPair] = {}
    for number, entry in enumerate(entries):
        where = f"images entry {number}"
        identity = field_of(entry, "id", int, where)
        text = field_of(entry, "text_input", str, where)
        name = field_of(entry, "file_name", str, where)
        height, width = (field_of(entry, side, int, where) for side in ("height", "width"))
        if identity in pairs:
            raise ValueError(f"{where}: id {identity} is taken by an earlier entry")
        if reason := key_problem(name):
            raise ValueError(f"{where}: file {reading.shown(name)}: {reason}")
        if not text.strip() or height < 1 or width < 1:
            raise ValueError(f"{where}: phrase {text!r}, file {name!r}, {height} x {width}: empty phrase or size")
        pairs[identity] = ConceptPair(identity, name, text, height, width, ())
    return pairs


@dataclass(frozen=True)
class ConceptSet:
    """Pairs that can be scored, in the order of the file.

    Attributes:
        pairs: The pairs.
        problems: Pairs that were left out, and annotations without pair or category.
        ids: Ids of all pairs in the file, including those that were left out.
        categories: For each annotator, the listed category ids; None if the file lists none, so that all count.
    """

    pairs: tuple[ConceptPair, ...]
    problems: tuple[BadInput, ...]
    ids: frozenset[int]
    _paths: Mapping[str, Path]
    categories: tuple[frozenset[int] | None, ...] = (None,)

    @classmethod
    def load(cls, json_path: Path, check_images: bool = True) -> ConceptSet:
        """Read a ground-truth file without opening images.

        Images are searched in the folder of the file, its parent, and ``images/`` in both. Left out and reported are
        pairs whose image is missing, pairs with an annotation that cannot be decoded, and pairs that are not
        exhaustively annotated (``is_instance_exhaustive`` 0). A group (``iscrowd`` 1) is not an object: predictions
        inside it are false positives, and a pair with groups only is negative. Annotations with an unlisted
        ``category_id`` are reported and are not objects.

        Args:
            json_path: The file.
            check_images: If False, images may be missing, for instance to score a file of predictions.

        Raises:
            UserError: The file is damaged or has another format, an id is used twice, or no pair is left.
        """
        record = read_json(json_path)
        try:
            entries = field_of(record, "images", list, "file")
            pairs = _read_pairs(entries)
            categories = _read_categories(record)
            drawn, bad, problems = _read_annotations(field_of(record, "annotations", list, "file"), pairs, categories)
        except ValueError as error:
            raise UserError(f"{json_path}: not an SA-Co file of concepts: {error}") from None
        beside = json_path.parent
        roots = [folder / below for folder in (beside, beside.parent) for below in ("", "images")]
        paths = {}
        for name in {pair.file_name: None for pair in pairs.values()}:
            found = next((root / name for root in roots if (root / name).is_file()), None)
            if found or not check_images:
                paths[name] = found or roots[0] / name
        kept = []
        for entry, pair in zip(entries, pairs.values(), strict=True):
            reason = bad.get(pair.id)
            if not entry.get("is_instance_exhaustive", 1):
                reason = "not exhaustively annotated"
            elif pair.file_name not in paths:
                reason = f"its image is missing in {', '.join(str(root) for root in roots)}"
            if reason:
                problems.append(BadInput(f"{pair.file_name} {pair.text!r} ({pair.id})", reason))
            else:
                kept.append(_with_objects(pair, drawn[pair.id]))
        if not kept:
            first = f"; {len(problems)} problems, first {problems[0].key}: {problems[0].reason}" if problems else ""
            raise UserError(f"{json_path}: no pair of image and phrase to score{first}")
        return cls(tuple(kept), tuple(problems), frozenset(pairs), paths, (categories,))

    @classmethod
    def load_annotators(cls, json_paths: Sequence[Path], check_images: bool = True) -> ConceptSet:
        """Read the same pairs as annotated by several annotators, one file each.

        Order, images and ``rles`` are those of the first file. A pair that is left out of one file is left out.
        Problems of the other files begin with the name of the file.

        Raises:
            UserError: As for ``load``; or a file lacks a pair, or has another phrase or size for it.
        """
        first = cls.load(json_paths[0], check_images)
        for path in json_paths[1:]:
            first = first._joined(cls.load(path, check_images=False), path)
        return first

    def _joined(self, other: ConceptSet, path: Path) -> ConceptSet:
        theirs, kept = {pair.id: pair for pair in other.pairs}, []
        for pair in self.pairs:
            same = theirs.get(pair.id)
            if pair.id not in other.ids:
                raise UserError(f"{path}: has no pair {pair.id}, {pair.text!r}; give files of the same pairs")
            if same is None:
                continue
            if (same.text, same.height, same.width) != (pair.text, pair.height, pair.width):
                raise UserError(
                    f"{path}: pair {pair.id} is {same.text!r}, {same.width} x {same.height} pixels, in the first file "
                    f"{pair.text!r}, {pair.width} x {pair.height}; give files of the same pairs"
                )
            kept.append(replace(pair, others=(*pair.others, same)))
        if not kept:
            raise UserError(f"{path}: no pair to score is left; every one is left out of it or of the first file")
        problems = tuple(BadInput(f"{path.name}: {bad.key}", bad.reason) for bad in other.problems)
        return replace(
            self, pairs=tuple(kept), problems=self.problems + problems, categories=self.categories + other.categories
        )

    @property
    def category(self) -> int:
        """A ``category_id`` for predictions that counts with the first annotator."""
        return min(self.categories[0]) if self.categories[0] else CATEGORY

    def path(self, pair: ConceptPair) -> Path:
        """Return the path of the image file."""
        return self._paths[pair.file_name]

    def by_image(self) -> dict[Path, list[ConceptPair]]:
        """Group the pairs by image file, so that each image is encoded once. Both are in the order of the file."""
        grouped: dict[Path, list[ConceptPair]] = defaultdict(list)
        for pair in self.pairs:
            grouped[self.path(pair)].append(pair)
        return dict(grouped)

    def masks(self, pair: ConceptPair) -> Bool[np.ndarray, "n h w"]:
        """Decode the masks of a pair's objects, in pixels of the image."""
        if not pair.rles:
            return np.zeros((0, pair.height, pair.width), bool)
        return np.ascontiguousarray(coco_mask.decode(list(pair.rles)).transpose(2, 0, 1)).astype(bool)


def tight_box(rle: Rle) -> Box:
    """Return the tight box of a mask: x, y, width, height in pixels."""
    x, y, width, height = (float(value) for value in coco_mask.toBbox(rle))
    return x, y, width, height


class _Drawn(NamedTuple):
    category: int
    rle: Rle
    box: Box | None
    group: bool


def _with_objects(pair: ConceptPair, drawn: Iterable[_Drawn]) -> ConceptPair:
    """Sort objects by category, then in the order of the file.

    The official evaluation has the same order, which decides between equal scores.
    """
    ordered = sorted(drawn, key=lambda one: one.category)
    objects = [one for one in ordered if not one.group]
    return replace(
        pair,
        rles=tuple(one.rle for one in objects),
        boxes=tuple(one.box for one in objects),
        groups=tuple(one.rle for one in ordered if one.group),
    )


def _read_categories(record: Any) -> frozenset[int] | None:
    if "categories" not in record:
        return None
    entries = enumerate(field_of(record, "categories", list, "file"))
    return frozenset(field_of(entry, "id", int, f"categories entry {number}") for number, entry in entries)


def read_box(entry: Mapping[str, Any]) -> Box | None:
    """Return the box of an annotation or a prediction, or None if there is no valid one."""
    values = entry.get("bbox")
    if not isinstance(values, list) or len(values) != 4 or not all(type(value) in (int, float) for value in values):
        return None
    x, y, width, height = (float(value) for value in values)
    usable = all(math.isfinite(value) for value in (x, y, width, height)) and width >= 0 and height >= 0
    return (x, y, width, height) if usable else None


def _read_annotations(
    entries: Any, pairs: Mapping[int, ConceptPair], categories: frozenset[int] | None
) -> tuple[Mapping[int, list[_Drawn]], dict[int, str], list[BadInput]]:
    """Read the objects of each pair.

    Returns:
        Objects by pair id, reasons why pairs cannot be scored, and annotations without pair or category.
    """
    drawn: dict[int, list[_Drawn]] = defaultdict(list)
    bad: dict[int, str] = {}
    taken: set[int | str] = set()
    problems = []
    for number, entry in enumerate(entries):
        where = f"annotations entry {number}"
        identity = field_of(entry, "image_id", int, where)
        pair, category = pairs.get(identity), category_of(entry, where)
        own = field_of({"id": where} | entry, "id", (int, str), where)
        if own in taken:
            raise ValueError(f"{where}: id {own} is taken by an earlier entry")
        taken.add(own)
        if pair is None:
            problems.append(BadInput(where, f"its image_id {identity} is not listed"))
        elif categories is not None and category not in categories:
            problems.append(BadInput(where, f"its category_id {category} is not listed, so it is ignored"))
        else:
            try:
                rle = runs_of(entry.get("segmentation"), pair.height, pair.width)
            except ValueError as error:
                bad[identity] = f"{where}: {error}"
            else:
                drawn[identity].append(_Drawn(category, rle, read_box(entry), bool(entry.get("iscrowd"))))
    return drawn, bad, problems


def outline(rle: Rle, category: int = CATEGORY) -> dict[str, Any]:
    """Return the fields of a mask in both kinds of files. The box is in pixels."""
    return {"category_id": category, "segmentation": rle, "bbox": list(tight_box(rle))}


def write_concepts(path: Path, pairs: Iterable[ConceptPair]) -> None:
    """Write a ground-truth file that ``ConceptSet.load`` reads. The file is written atomically."""
    images, annotations = [], []
    for pair in pairs:
        images.append({"id": pair.id, "file_name": pair.file_name, "height": pair.height, "width": pair.width,
                       "text_input": pair.text, "is_instance_exhaustive": 1})  # fmt: skip
        for crowd, rle in [*((0, rle) for rle in pair.rles), *((1, rle) for rle in pair.groups)]:
            annotations.append({"id": len(annotations) + 1, "image_id": pair.id, **outline(rle),
                                "area": int(coco_mask.area(rle)), "iscrowd": crowd})  # fmt: skip
    categories = [{"id": 1, "name": "object"}]
    write_json(path, {"images": images, "annotations": annotations, "categories": categories})


def find_concepts(root: Path) -> Path | None:
    """Find the ground-truth file of a data set.

    Args:
        root: A ``.json`` file, or a folder that has ``concepts_val.json`` or ``concepts.json``, also in
            ``annotations/``.

    Returns:
        The path, or None if there is no such file.
    """
    if root.is_file():
        return root if root.suffix == ".json" else None
    names = ("concepts_val.json", "concepts.json")
    candidates = (folder / name for folder in (root, root / "annotations") for name in names)
    return next((path for path in candidates if path.is_file()), None)
