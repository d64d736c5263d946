"""Scores of predictions for (image, noun phrase) pairs, with masks as run-length encodings: cgF1 and COCO's AP."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..data.saco import ConceptPair, ConceptSet, Rle
from ..data.saco_predictions import IouKind, PredictedInstance, box_of, boxes_of, check_predictions
from ..metrics.concepts import SCORE_THRESHOLD, ConceptScores


def shape_ious(pred: Sequence[Rle | list[float]], target: Sequence[Rle | list[float]]) -> Float[Tensor, "n m"]:
    """Compute the intersection over union of every prediction with every target.

    Args:
        pred: n run-length encodings of one size, or n boxes in COCO's xywh format.
        target: m shapes of the same kind.

    Returns:
        float64 values in 0..1 of shape (n, m).
    """
    if not pred or not target:
        return torch.zeros(len(pred), len(target), dtype=torch.float64)
    return torch.from_numpy(coco_mask.iou(list(pred), list(target), [0] * len(target)))


def score_predictions(
    truth: ConceptSet, predictions: Mapping[int, Sequence[PredictedInstance]], threshold: float = SCORE_THRESHOLD,
    iou: IouKind = "masks",
) -> ConceptScores:  # fmt: skip
    """Compute the counts of cgF1 over all pairs. Arguments and errors are those of ``score_images``.

    Returns:
        The counts; ``summary`` computes the metrics.
    """
    return ConceptScores.merge(score_images(truth, predictions, threshold, iou).values())


def score_images(
    truth: ConceptSet, predictions: Mapping[int, Sequence[PredictedInstance]], threshold: float = SCORE_THRESHOLD,
    iou: IouKind = "masks",
) -> dict[Path, ConceptScores]:  # fmt: skip
    """Compute the counts of cgF1 over the pairs of each image.

    Args:
        truth: The pairs and their annotations. If a pair has several annotators, the one with the best score counts.
        predictions: Predictions by pair id. A missing pair has no predictions.
        threshold: Predictions with a lower score are ignored. Predictions of a category that an annotator's file does
            not list are ignored for that annotator.
        iou: Compare masks or boxes.

    Returns:
        The counts by image file, in the order of ``truth.by_image()``.

    Raises:
        UserError: ``check_predictions`` finds an error in the predictions.
    """
    check_predictions(truth, predictions, iou)
    found = dict[Path, ConceptScores]()
    for pair in truth.pairs:
        kept = [found for found in predictions.get(pair.id, ()) if found.score >= threshold]
        # sorted by category like the objects, because their order decides ties of the assignment
        kept.sort(key=lambda found: found.category)
        annotators = zip((pair, *pair.others), truth.categories, strict=True)
        ious = (_ious(kept, annotated, listed, iou) for annotated, listed in annotators)
        found[truth.path(pair)] = found.get(truth.path(pair), ConceptScores()).update(*ious)
    return found


def _ious(
    kept: Sequence[PredictedInstance], pair: ConceptPair, categories: frozenset[int] | None, iou: IouKind
) -> Float[Tensor, "n m"]:
    known = [found for found in kept if categories is None or found.category in categories]
    if iou == "boxes":
        return shape_ious([list(box_of(found)) for found in known], [list(box) for box in boxes_of(pair)])
    return shape_ious([found.rle for found in known], pair.rles)


def _indexed(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    # ids begin at 1, because COCOeval reads a match with id 0 as no match
    numbered = [{"id": number, "category_id": 1, "iscrowd": 0, **a} for number, a in enumerate(annotations, 1)]
    coco.dataset = {"images": images, "annotations": numbered, "categories": [{"id": 1, "name": "object"}]}
    coco.createIndex()
    return coco


def _annotation(identity: int, rle: Rle) -> dict[str, Any]:
    return {"image_id": identity, "segmentation": rle, "area": float(coco_mask.area(rle))}


def mask_ap(truth: ConceptSet, predictions: Mapping[int, Sequence[PredictedInstance]]) -> dict[str, float]:
    """Compute COCO's mask average precision with COCOeval. All pairs form one category.

    Each pair is an image of its own. A prediction for a phrase without objects is a false positive. A prediction that
    matches a group (``iscrowd``) is ignored. Scores have no threshold, and the 100 highest per pair are used.

    Args:
        truth: The pairs and their annotations. If a pair has several annotators, the first one is used.
        predictions: Predictions by pair id.

    Returns:
        ``ap`` (mean over IoU 0.50 to 0.95), ``ap_50`` and ``ap_75``, each 0..1. Empty if no pair has an object, because
        recall is not defined then.

    Raises:
        UserError: ``check_predictions`` finds an error in the predictions.
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
    precision = run.eval["precision"][..., 0, 0, 0].mean(1)  # mean over the 101 recall thresholds, per IoU threshold
    at = {round(100 * threshold): number for number, threshold in enumerate(run.params.iouThrs)}
    return {"ap": float(np.mean(precision)), "ap_50": float(precision[at[50]]), "ap_75": float(precision[at[75]])}
