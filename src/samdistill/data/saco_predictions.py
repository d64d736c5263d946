"""Predictions for pairs of an image and a phrase: read, write and check COCO results lists."""

from __future__ import annotations

import math
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..io import write_json
from ..types import UserError
from .saco import (
    CATEGORY,
    Box,
    ConceptPair,
    ConceptSet,
    Rle,
    category_of,
    field_of,
    outline,
    read_box,
    read_json,
    runs_of,
    tight_box,
)
from .skipped import BadInput

IouKind = Literal["masks", "boxes"]
_SHARES_END = 1.5  # boxes that end below this are fractions of the image; a set of boxes in pixels is never that small


@dataclass(frozen=True)
class PredictedInstance:
    """One predicted instance.

    Attributes:
        score: Confidence, 0..1.
        rle: Mask in pixels of the image; None in a file of boxes.
        category: ``category_id``. The prediction counts if the ground truth lists it.
        box: ``bbox`` as in the file, or None.
    """

    score: float
    rle: Rle | None
    category: int = CATEGORY
    box: Box | None = None


def load_predictions(json_path: Path) -> dict[int, list[PredictedInstance]]:
    """Read a COCO results list.

    Each entry has ``image_id`` (the id of a pair), ``score``, and ``segmentation`` (run lengths) or ``bbox``. Use
    ``check_predictions`` to compare the list with a ground truth.

    Returns:
        Predictions by pair id.

    Raises:
        UserError: The file is damaged or has another format, a score is not finite, or run lengths do not fit their
            size.
    """
    record = read_json(json_path)
    if not isinstance(record, list):
        raise UserError(f"{json_path}: holds {type(record).__name__}, not a COCO results list")
    predictions: dict[int, list[PredictedInstance]] = defaultdict(list)
    for number, entry in enumerate(record):
        where = f"entry {number}"
        try:
            identity = field_of(entry, "image_id", int, where)
            score = float(field_of(entry, "score", (int, float), where))
            if not math.isfinite(score):
                raise ValueError(f"{where}: score is {score}")
            category, box = category_of(entry, where), read_box(entry)
            rle = None if box is not None and "segmentation" not in entry else _predicted(entry, where)
            predictions[identity].append(PredictedInstance(score, rle, category, box))
        except ValueError as error:
            reason = str(error) if str(error).startswith(where) else f"{where}: {error}"
            raise UserError(f"{json_path}: not a COCO results list: {reason}") from None
    return dict(predictions)


def _predicted(entry: Mapping[str, Any], where: str) -> Rle:
    segmentation = field_of(entry, "segmentation", dict, where)
    size = field_of(segmentation, "size", list, where)
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"{where}: size is {reprlib.repr(size)}, not [height, width]")
    return runs_of(segmentation, *size)


def write_predictions(path: Path, predictions: Mapping[int, Sequence[PredictedInstance]]) -> None:
    """Write predictions as a COCO results list that ``load_predictions`` reads.

    The file is written atomically. All predictions need masks.

    Args:
        path: The file.
        predictions: Predictions by pair id.
    """
    write_json(path, [
        {"image_id": identity, **outline(found.rle, found.category), "score": found.score}
        for identity, all_found in predictions.items()
        for found in all_found
    ])  # fmt: skip


def check_predictions(
    truth: ConceptSet, predictions: Mapping[int, Sequence[PredictedInstance]], iou: IouKind = "masks"
) -> None:
    """Check that predictions can be compared with a ground truth.

    Args:
        truth: The pairs.
        predictions: Predictions by pair id.
        iou: Compare ``masks`` or ``boxes``.

    Raises:
        UserError: No prediction belongs to a pair, a mask is missing or has another size than the image, or boxes are
            in pixels on one side and fractions of the image on the other.
    """
    if predictions and not truth.ids & predictions.keys():
        raise UserError(f"predictions: no image_id is in the ground truth, not {min(predictions)} either; give the "
                        "predictions that were made for this file")  # fmt: skip
    if iou == "boxes":
        drawn = [box for pair in truth.pairs for each in (pair, *pair.others) for box in boxes_of(each)]
        found = [box_of(p) for pair in truth.pairs for p in predictions.get(pair.id, ())]
        if drawn and found and _in_shares(drawn) != _in_shares(found):
            kinds = ["shares of the image" if _in_shares(boxes) else "pixels" for boxes in (drawn, found)]
            raise UserError(f"predictions: the boxes of the ground truth are {kinds[0]}, those of the predictions "
                            f"{kinds[1]}; write both alike")  # fmt: skip
        return
    for pair in truth.pairs:
        for prediction in predictions.get(pair.id, ()):
            if prediction.rle is None:
                raise UserError(f"predictions: image_id {pair.id} has a box and no segmentation; write masks, or "
                                "compare boxes with --iou boxes")  # fmt: skip
            if prediction.rle["size"] != [pair.height, pair.width]:
                raise UserError(f"predictions: image_id {pair.id} has a mask of {prediction.rle['size']}, its "
                                f"image is {[pair.height, pair.width]}; write masks at full size")  # fmt: skip


def unused_predictions(truth: ConceptSet, predictions: Mapping[int, Sequence[PredictedInstance]]) -> list[BadInput]:
    """List predictions that are ignored, as in the official evaluation: without a pair, or of an unlisted category."""
    foreign = sorted(predictions.keys() - truth.ids)
    listed = None if None in truth.categories else frozenset().union(*truth.categories)
    own = (p.category for found in predictions.values() for p in found)
    odd = [] if listed is None else sorted(category for category in own if category not in listed)
    reasons = [
        (foreign, "{} ignored: image_ids that are not in the ground truth, such as {}"),
        (odd, "{} ignored: a category_id that the ground truth does not list, such as {}"),
    ]
    return [BadInput("predictions", text.format(len(ids), ids[0])) for ids, text in reasons if ids]


def boxes_of(pair: ConceptPair) -> list[Box]:
    """Return the boxes of a pair's objects. A missing box is derived from the mask, in pixels."""
    given = pair.boxes or (None,) * len(pair.rles)
    return [tight_box(rle) if box is None else box for box, rle in zip(given, pair.rles, strict=True)]


def box_of(prediction: PredictedInstance) -> Box:
    """Return the box of a prediction. A missing box is derived from the mask, in pixels."""
    return prediction.box if prediction.box is not None or prediction.rle is None else tight_box(prediction.rle)


def _in_shares(boxes: Iterable[Box]) -> bool:
    """Return whether boxes are fractions of the image."""
    return all(x + width <= _SHARES_END and y + height <= _SHARES_END for x, y, width, height in boxes)
