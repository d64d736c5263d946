"""Concepts in the layout of SA-Co (Carion et al., SAM 3, 2025): (image, noun phrase) pairs, and predictions for them.

Ground truth is a COCO file whose ``images`` are pairs, each with a ``text_input``; several pairs share a ``file_name``.
Predictions are a COCO results list. ``bbox`` and ``area`` are never read: SA-Co gives shares of the image, COCO pixels.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask

from ..types import UserError
from .coco import decode_segmentation, run_lengths
from .sources import BadInput

Rle = dict[str, Any]
"""COCO's compressed run lengths: ``size`` [height, width] and ``counts``, a string."""


@dataclass(frozen=True)
class ConceptPair:
    """A phrase asked of an image, and every object it names there; no ``rles`` make the pair a negative one.

    height, width: of the image file, in pixels, and of each of ``rles``.
    """

    id: int
    file_name: str
    text: str
    height: int
    width: int
    rles: tuple[Rle, ...]


@dataclass(frozen=True)
class Prediction:
    """One mask a model found for a pair, in the pixels of the image file. score: 0..1, higher is surer."""

    score: float
    rle: Rle


def to_rle(mask: Bool[np.ndarray, "h w"]) -> Rle:
    """Compressed run lengths of a mask, as they are written to files."""
    runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode("ascii")}


def _runs(segmentation: Any, height: int, width: int) -> Rle:
    """Any of COCO's spellings as compressed run lengths. Raises ``ValueError`` where it does not fit the image."""
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    if isinstance(counts, str) and segmentation.get("size") == [height, width]:
        lengths = run_lengths(counts)
        if lengths.min() >= 0 and lengths.sum() == height * width:  # already in the form wanted; the usual case
            return {"size": [height, width], "counts": counts}
    try:
        return to_rle(decode_segmentation(segmentation, height, width))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"segmentation cannot be read: {error!r}") from error


def _field(entry: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where}: {name!r} is {reprlib.repr(value)}, not {wanted}")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from None


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None


def _read_pairs(entries: Any) -> dict[int, ConceptPair]:
    """By id, in the file's order, objects not yet added."""
    pairs: dict[int, ConceptPair] = {}
    for number, entry in enumerate(entries):
        where = f"images entry {number}"
        identity = _field(entry, "id", int, where)
        text = _field(entry, "text_input", str, where)
        name = _field(entry, "file_name", str, where)
        height, width = (_field(entry, side, int, where) for side in ("height", "width"))
        if identity in pairs:
            raise ValueError(f"{where}: id {identity} is taken by an earlier entry")
        if not text.strip() or not name or height < 1 or width < 1:
            raise ValueError(f"{where}: phrase {text!r}, file {name!r}, {height} x {width} is not a pair")
        pairs[identity] = ConceptPair(identity, name, text, height, width, ())
    return pairs


@dataclass(frozen=True)
class ConceptSet:
    """Pairs that can be scored, in the file's order.

    problems: pairs left out, and annotations of no pair. ids: of all pairs in the file, those left out too.
    """

    pairs: tuple[ConceptPair, ...]
    problems: tuple[BadInput, ...]
    ids: frozenset[int]
    _paths: Mapping[str, Path]

    @classmethod
    def load(cls, json_path: Path, images_root: Path | None = None, check_images: bool = True) -> ConceptSet:
        """Read ground truth; no image is opened.

        Images lie under ``images_root``, or without one beside the JSON, in its parent folder, or in ``images/`` of
        either. check_images: with False files need not be there, which is enough to score a file of predictions.

        Left out, and listed: a pair whose image is missing, one with an annotation that cannot be drawn, one that is
        not exhaustively annotated (``is_instance_exhaustive`` 0), and one annotated as a group alone
        (``iscrowd`` 1), for its objects are there but not known one by one. Elsewhere a group is no object, and what
        is predicted inside it is a false positive, as in SA-Co's own evaluation.
        Raises ``UserError`` for a torn or foreign file, an id given twice, and where no pair is left.
        """
        record = _read_json(json_path)
        try:
            entries = _field(record, "images", list, "file")
            pairs = _read_pairs(entries)
            rles, bad, problems = _read_annotations(_field(record, "annotations", list, "file"), pairs)
        except ValueError as error:
            raise UserError(f"{json_path}: not an SA-Co file of concepts: {error}") from None
        beside = json_path.parent
        roots = [images_root] if images_root else [r / s for r in (beside, beside.parent) for s in ("", "images")]
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
                whole = (pair.id, pair.file_name, pair.text, pair.height, pair.width, tuple(rles[pair.id]))
                kept.append(ConceptPair(*whole))
        if not kept:
            first = f"; {len(problems)} problems, first {problems[0].key}: {problems[0].reason}" if problems else ""
            raise UserError(f"{json_path}: no pair of image and phrase to score{first}")
        return cls(tuple(kept), tuple(problems), frozenset(pairs), paths)

    def path(self, pair: ConceptPair) -> Path:
        """The image file."""
        return self._paths[pair.file_name]

    def by_image(self) -> dict[Path, list[ConceptPair]]:
        """The pairs of each image file, so that it is encoded once; both in the file's order."""
        grouped: dict[Path, list[ConceptPair]] = defaultdict(list)
        for pair in self.pairs:
            grouped[self.path(pair)].append(pair)
        return dict(grouped)

    def masks(self, pair: ConceptPair) -> Bool[np.ndarray, "n h w"]:
        """The pair's objects, in the pixels of the image file."""
        if not pair.rles:
            return np.zeros((0, pair.height, pair.width), bool)
        return np.ascontiguousarray(coco_mask.decode(list(pair.rles)).transpose(2, 0, 1)).astype(bool)

    def check(self, predictions: Mapping[int, Sequence[Prediction]]) -> None:
        """Raises ``UserError`` for predictions of a pair that the file does not have, and for masks of another size."""
        unknown = sorted(set(predictions) - self.ids)
        if unknown:
            raise UserError(f"predictions: {len(unknown)} of {len(predictions)} image_ids are not in the ground truth, "
                            f"such as {unknown[0]}; give the predictions that were made for this file")  # fmt: skip
        for pair in self.pairs:
            for prediction in predictions.get(pair.id, ()):
                if prediction.rle["size"] != [pair.height, pair.width]:
                    raise UserError(f"predictions: image_id {pair.id} has a mask of {prediction.rle['size']}, its "
                                    f"image is {[pair.height, pair.width]}; write masks at full size")  # fmt: skip


def _read_annotations(
    entries: Any, pairs: Mapping[int, ConceptPair]
) -> tuple[dict[int, list[Rle]], dict[int, str], list[BadInput]]:
    """The objects of each pair, why a pair cannot be scored, and annotations that belong to none."""
    rles: dict[int, list[Rle]] = defaultdict(list)
    bad: dict[int, str] = {}
    groups: set[int] = set()
    problems = []
    for number, entry in enumerate(entries):
        where = f"annotations entry {number}"
        identity = _field(entry, "image_id", int, where)
        pair = pairs.get(identity)
        if pair is None:
            problems.append(BadInput(where, f"its image_id {identity} is not listed"))
        elif entry.get("iscrowd"):
            groups.add(identity)
        else:
            try:
                rles[identity].append(_runs(entry.get("segmentation"), pair.height, pair.width))
            except ValueError as error:
                bad[identity] = f"{where}: {error}"
    for identity in groups - set(rles):
        bad[identity] = "annotated as a group alone"
    return rles, bad, problems


def load_predictions(json_path: Path) -> dict[int, list[Prediction]]:
    """Read a COCO results list: ``image_id`` (a pair's id), ``score``, ``segmentation`` as run lengths.

    ``ConceptSet.check`` says whether they fit a ground truth. Raises ``UserError`` for a torn or foreign file, a score
    that is no finite number, and run lengths that do not fill their size.
    """
    record = _read_json(json_path)
    if not isinstance(record, list):
        raise UserError(f"{json_path}: holds {type(record).__name__}, not a COCO results list")
    predictions: dict[int, list[Prediction]] = defaultdict(list)
    for number, entry in enumerate(record):
        where = f"entry {number}"
        try:
            identity = _field(entry, "image_id", int, where)
            score = float(_field(entry, "score", (int, float), where))
            if not math.isfinite(score):
                raise ValueError(f"{where}: score is {score}")
            segmentation = _field(entry, "segmentation", dict, where)
            size = _field(segmentation, "size", list, where)
            if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
                raise ValueError(f"{where}: size is {reprlib.repr(size)}, not [height, width]")
            predictions[identity].append(Prediction(score, _runs(segmentation, *size)))
        except ValueError as error:
            reason = str(error) if str(error).startswith(where) else f"{where}: {error}"
            raise UserError(f"{json_path}: not a COCO results list: {reason}") from None
    return dict(predictions)


def _outline(rle: Rle) -> dict[str, Any]:
    """What a mask looks like in both kinds of file; the box is x, y, width, height in pixels, as in COCO."""
    return {"category_id": 1, "segmentation": rle, "bbox": [float(v) for v in coco_mask.toBbox(rle)]}


def write_concepts(path: Path, pairs: Iterable[ConceptPair]) -> None:
    """Write ground truth that ``ConceptSet.load`` reads back; the file is whole or absent."""
    images, annotations = [], []
    for pair in pairs:
        images.append({"id": pair.id, "file_name": pair.file_name, "height": pair.height, "width": pair.width,
                       "text_input": pair.text, "is_instance_exhaustive": 1})  # fmt: skip
        for rle in pair.rles:
            annotations.append({"id": len(annotations) + 1, "image_id": pair.id, **_outline(rle),
                                "area": int(coco_mask.area(rle)), "iscrowd": 0})  # fmt: skip
    categories = [{"id": 1, "name": "object"}]
    _write_json(path, {"images": images, "annotations": annotations, "categories": categories})


def write_predictions(path: Path, predictions: Mapping[int, Sequence[Prediction]]) -> None:
    """Write a COCO results list that ``load_predictions`` reads back, by pair id; the file is whole or absent."""
    _write_json(path, [
        {"image_id": identity, **_outline(found.rle), "score": found.score}
        for identity, all_found in predictions.items()
        for found in all_found
    ])  # fmt: skip


def find_concepts(root: Path) -> Path | None:
    """The ground truth in ``root``: a ``.json`` file itself, or ``concepts_val.json`` or ``concepts.json`` in a folder
    or in its ``annotations``; None where there is none."""
    if root.is_file():
        return root if root.suffix == ".json" else None
    names = ("concepts_val.json", "concepts.json")
    candidates = (folder / name for folder in (root, root / "annotations") for name in names)
    return next((path for path in candidates if path.is_file()), None)
