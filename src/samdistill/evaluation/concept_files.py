"""Score predictions against pairs of image and phrase, both from files: cgF1, and COCO's average precision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..data.saco import ConceptPair, ConceptSet, Rle
from ..data.saco_predictions import IouKind, Prediction, box_of, boxes_of, check_predictions
from ..metrics.concepts import SCORE_THRESHOLD, ConceptScores


def shape_ious(pred: Sequence[Rle | list[float]], target: Sequence[Rle | list[float]]) -> Float[Tensor, "n m"]:
    """Intersection over union of every prediction with every target: run lengths of one size, or COCO's boxes."""
    if not pred or not target:
        return torch.zeros(len(pred), len(target), dtype=torch.float64)
    return torch.from_numpy(coco_mask.iou(list(pred), list(target), [0] * len(target)))


def score_predictions(
    truth: ConceptSet, predictions: Mapping[int, Sequence[Prediction]], threshold: float = SCORE_THRESHOLD,
    iou: IouKind = "masks",
) -> ConceptScores:  # fmt: skip
    """cgF1's counts over every pair of ``truth``; a pair without predictions is one where the model found nothing.

    Predictions below ``threshold`` do not count, nor do those of a category that an annotator's file does not list. Of
    several annotators the best counts, pair by pair. Raises ``UserError`` for predictions that
    ``check_predictions`` refuses.
    """
    check_predictions(truth, predictions, iou)
    scores = ConceptScores()
    for pair in truth.pairs:
        kept = [found for found in predictions.get(pair.id, ()) if found.score >= threshold]
        # by category, as the objects are: ties of the assignment go by order
        kept.sort(key=lambda found: found.category)
        annotators = zip((pair, *pair.others), truth.categories, strict=True)
        scores = scores.update(*(_ious(kept, annotated, listed, iou) for annotated, listed in annotators))
    return scores


def _ious(
    kept: Sequence[Prediction], pair: ConceptPair, categories: frozenset[int] | None, iou: IouKind
) -> Float[Tensor, "n m"]:
    known = [found for found in kept if categories is None or found.category in categories]
    if iou == "boxes":
        return shape_ious([list(box_of(found)) for found in known], [list(box) for box in boxes_of(pair)])
    return shape_ious([found.rle for found in known], pair.rles)


def _indexed(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    # ids begin at 1: COCOeval takes a match with id 0 for none
    numbered = [{"id": number, "category_id": 1, "iscrowd": 0, **a} for number, a in enumerate(annotations, 1)]
    coco.dataset = {"images": images, "annotations": numbered, "categories": [{"id": 1, "name": "object"}]}
    coco.createIndex()
    return coco


def _annotation(identity: int, rle: Rle) -> dict[str, Any]:
    return {"image_id": identity, "segmentation": rle, "area": float(coco_mask.area(rle))}


def mask_ap(truth: ConceptSet, predictions: Mapping[int, Sequence[Prediction]]) -> dict[str, float]:
    """``ap`` (mean over IoU 0.50 to 0.95), ``ap_50`` and ``ap_75`` of masks, by COCOeval; all pairs are one category.

    Each pair is an image of its own: a prediction where the phrase names nothing is a false positive, one in a group
    (``iscrowd``) neither right nor wrong. Every score counts, the 100 highest of a pair at most. Of several annotators
    the first is taken. Empty where no pair of ``truth`` has an object, for precision at a recall is not defined then.
    Raises ``UserError`` for predictions that ``check_predictions`` refuses.
    """
    check_predictions(truth, predictions)
    listed = truth.categories[0]
    images = [{"id": pair.id, "height": pair.height, "width": pair.width} for pair in truth.pairs]
    objects = [_annotation(pair.id, rle) for pair in truth.pairs for rle in pair.rles]
    groups = [{**_annotation(pair.id, rle), "iscrowd": 1} for pair in truth.pairs for rle in pair.groups]
    found = [
        {**_annotation(pair.id, prediction.rle), "score": prediction.score}
        for pair in truth.pairs
        for prediction in predictions.get(pair.id, ())
        if listed is None or prediction.category in listed
    ]
    if not objects:
        return {}
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(_indexed(images, objects + groups), _indexed(images, found), iouType="segm")
        run.params.areaRng, run.params.areaRngLbl, run.params.maxDets = [[0, 1e10]], ["all"], [100]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][..., 0, 0, 0].mean(1)  # by IoU threshold: mean over 101 recalls
    at = {round(100 * threshold): number for number, threshold in enumerate(run.params.iouThrs)}
    return {"ap": float(np.mean(precision)), "ap_50": float(precision[at[50]]), "ap_75": float(precision[at[75]])}
