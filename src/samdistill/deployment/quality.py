"""Calibration data of int8: one half gives the ranges of values, the other half measures what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from pycocotools import mask as coco_mask
from torch import Tensor

from ..data.layouts import held_out_images
from ..data.saco import ConceptSet, Rle, find_concepts
from ..data.saco_predictions import PredictedInstance
from ..data.sources import Source
from ..data.transforms import Geometry
from ..evaluation.concept_result import Found
from ..evaluation.concepts import evaluate_concepts
from ..evaluation.runner import evaluate_models
from ..inference.concepts import ConceptModel
from ..inference.geometry import canvas_of, own_geometry
from ..inference.label import find_images
from ..inference.pictures import image_batch, lay
from ..io import as_path
from ..metrics.concepts import SCORE_THRESHOLD
from ..ops.images import normalise
from ..ops.promptable import Promptable, image_size
from .companions import canvas
from .gate import LIMITS
from .opened import open_detector, open_promptable

MOST_IMAGES = 64
"""Images of each half that are used. The ranges hardly change after a few dozen."""
MOST_LOST = 0.01
"""Largest loss of mIoU or cgF1 that int8 may have."""
Measure = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Calibration:
    """Images for ``int8``, and what is known about them.

    Attributes:
        pixels: The first half, which gives the ranges, as normalised input of the model.
        held_out: The second half, for the gate. It is the first again if there is one image.
        measure: Function of a folder to what its int8 files give on the second half: ``figures`` of ``model`` and
            ``file`` by metric, and ``agreement`` of the two by prompt kind, ``words`` for a detector. None without
            labels.
        agrees: Whether ``measure`` gives the agreement, on the annotated objects. The gate then leaves it to that.
    """

    pixels: Float[Tensor, "n 3 s s"]
    held_out: Float[Tensor, "m 3 s s"]
    measure: Measure | None
    agrees: bool = False

    def quality(self, folder: Path) -> dict[str, Any]:
        """Return what ``export.json`` says about the int8 files of a folder.

        Args:
            folder: The exported folder, with its record.

        Returns:
            ``measured``; then ``figures`` by metric for ``model`` and ``file`` and the largest loss, ``lost``, or the
            ``reason`` for which it was not measured.
        """
        if self.measure is None:
            return {"measured": False, "reason": "the calibration data have no labels for this model"}
        found = self.measure(folder)
        lost = max(one["model"] - one["file"] for one in found["figures"].values())
        return {"measured": True, **found, "lost": lost}


def shortfall(quality: dict[str, Any]) -> str | None:
    """Return why int8 files with this ``quality`` are refused, or None."""
    if quality["measured"] and quality["lost"] > MOST_LOST:
        names = ", ".join(quality["figures"])
        return f"int8 loses {quality['lost']:.3f} of {names} on held-out data, over {MOST_LOST}"
    least = LIMITS["int8"].agreement
    if (found := quality.get("agreement", {}).get("box", 1.0)) < least:
        return f"the masks of boxes on held-out data agree by {found:.3f} with the model's, under {least}"
    return None


def calibration(model: ConceptModel | Promptable, data: str | Path) -> Calibration:
    """Read calibration data.

    Labels are masks (SA-1B, COCO) for a promptable model, and questions in the SA-Co layout for a detector.

    Args:
        model: The model.
        data: A folder, a glob pattern, an image, or an SA-Co file.

    Raises:
        UserError: There are no images, one cannot be read, or the labels are damaged.
    """
    files, measure = _labelled(model, data)
    agrees = measure is not None and isinstance(model, Promptable)
    return Calibration(_pixels(model, files[::2]), _pixels(model, files[1::2] or files), measure, agrees)


def _labelled(model: ConceptModel | Promptable, data: str | Path) -> tuple[list[Path], Measure | None]:
    """Return all images, and the function that measures on every second one. None if there are no labels."""
    place = as_path(data)
    if isinstance(model, Promptable):
        images = find_images(data)
        source = held_out_images(place) if place.is_dir() else None
        if source is None or not source.labelled or len(source.keys) < 2:
            return images, None
        files = [source.path(key) for key in source.keys]
        source.keys = source.keys[1::2][:MOST_IMAGES]
        return files, lambda folder: _masks(model, open_promptable(folder, "int8")[0], source)
    if (listing := find_concepts(place)) is None:
        return find_images(data), None
    concepts = ConceptSet.load(listing)
    files = list(concepts.by_image())
    if len(files) < 2 or not any(model.words.fits(pair.text) for pair in concepts.pairs):
        return files, None
    chosen = set(files[1::2][:MOST_IMAGES])
    half = replace(concepts, pairs=tuple(pair for pair in concepts.pairs if concepts.path(pair) in chosen))
    return files, lambda folder: _concepts(model, open_detector(folder, "int8")[0], half)


def _masks(model: Promptable, opened: Promptable, source: Source) -> dict[str, Any]:
    place = Geometry(image_size(model), own_geometry(model))
    models = {"model": model, "file": opened}
    found = evaluate_models(models, source, place, teacher="model", pictures=0, repeats=0)
    figures = {f"mIoU {kind}": {name: found.row(name).miou[kind] for name in models} for kind in found.row("file").miou}
    return {"figures": figures, "agreement": dict(found.row("file").agreement)}


def _concepts(model: ConceptModel, opened: ConceptModel, concepts: ConceptSet) -> dict[str, Any]:
    """Questions outside a fixed vocabulary are left out for both."""
    found = evaluate_concepts({"model": model, "file": opened}, concepts, pictures=0, repeats=0)
    figures = {"cgF1": {row.name: row.cgf1 for row in found.rows}}
    return {
        "figures": figures,
        "agreement": {"words": union_iou(found.predictions["model"], found.predictions["file"])},
    }


def union_iou(first: Found, second: Found, threshold: float = SCORE_THRESHOLD) -> float:
    """Return the agreement of two detectors: the mean IoU of all that each finds for a question.

    What a detector finds is the union of its masks with a score of at least ``threshold``. Questions for which both
    find nothing are left out; if only one of them finds something, the IoU is 0.

    Args:
        first: Predictions by question.
        second: Predictions of the other detector for the same questions.
        threshold: Minimum score.

    Returns:
        The mean, 1 if neither finds anything.
    """
    both = []
    for question, theirs in second.items():
        unions = [_union(some, threshold) for some in (first[question], theirs)]
        if None not in unions:
            both.append(float(coco_mask.iou([unions[0]], [unions[1]], [0])[0, 0]))
        elif unions != [None, None]:
            both.append(0.0)
    return statistics.fmean(both) if both else 1.0


def _union(found: Sequence[PredictedInstance], threshold: float) -> Rle | None:
    """Return the union of masks. None if it is empty."""
    masks = [one.rle for one in found if one.score >= threshold]
    union = coco_mask.merge(masks) if masks else None
    return union if union is not None and coco_mask.area(union) else None


def _pixels(model: ConceptModel | Promptable, files: Sequence[Path]) -> Float[Tensor, "n 3 s s"]:
    """Return images as the model's normalised input, at most ``MOST_IMAGES`` evenly spread ones."""
    about, step = canvas(model), max(1, len(files) // MOST_IMAGES)
    batch = image_batch([lay(file, canvas_of(model)) for file in files[::step][:MOST_IMAGES]])
    pixels = normalise(batch.images, tuple(about["mean"]), tuple(about["std"]))
    if about["zero_padding"]:
        pixels = pixels * batch.valid((about["image_size"], about["image_size"]))[:, None]
    return pixels
