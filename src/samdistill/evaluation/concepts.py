"""Evaluation of detectors on (image, phrase) pairs: cgF1 and its factors, mask AP, parameters, latency, pictures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from ..data.images import UnreadableImage, read_image
from ..data.saco import ConceptPair, ConceptSet, Rle, to_rle
from ..data.saco_predictions import IouKind, PredictedInstance, unused_predictions
from ..data.skipped import BadInput, leave_out
from ..data.sources import evenly, size_problem
from ..inference.concepts import AT_ONCE, ConceptModel, detections
from ..inference.drawing import draw_instances
from ..inference.geometry import canvas_of
from ..inference.pictures import image_batch, lay
from ..metrics.concepts import SCORE_THRESHOLD, ConceptScores
from ..ops.masks import masks_to_boxes
from ..types import ConceptPrompts, ImageBatch, UserError
from .concept_files import mask_ap, score_images
from .concept_result import ConceptResult, Found
from .latency import device_name, parameters
from .pictures import GROUND_TRUTH, SIDE
from .result import Conditions, Panel, Picture
from .rows import ConceptRow

MOST = 100
"""Predictions per pair that are kept regardless of their score, for COCO's average precision."""


def some_images(concepts: ConceptSet, images: int | None) -> ConceptSet:
    """Select the pairs of at most ``images`` images, evenly spread over the file. None selects all."""
    if images is None:
        return concepts
    chosen = set(evenly(list(concepts.by_image()), images))
    return replace(concepts, pairs=tuple(pair for pair in concepts.pairs if concepts.path(pair) in chosen))


def evaluate_concepts(
    models: Mapping[str, ConceptModel], concepts: ConceptSet, *, teacher: str | None = None,
    geometry: str | None = None, threshold: float = SCORE_THRESHOLD, images: int | None = None, batch_size: int = 4,
    pictures: int = 6, repeats: int = 9, progress: Callable[[int], object] | None = None,
) -> ConceptResult:  # fmt: skip
    """Run detectors on every pair and compute their figures.

    Each model reads the images at its own size, on its own device. Images that cannot be read or differ from the size
    in the file are skipped and listed, and so are phrases that are too long for a model.

    Args:
        models: Detectors by name.
        concepts: The pairs with their ground truth.
        teacher: Name of the model that the others are compared with.
        geometry: ``square`` or ``longest_side``; None uses each model's own.
        threshold: Minimum score of a prediction. Mask AP ranks the best 100 regardless of it.
        images: Maximum number of images, evenly spread over the file. None for all.
        batch_size: Images in one forward pass. An image is encoded once per ``AT_ONCE`` phrases.
        pictures: Number of pictures.
        repeats: Rounds of the latency measurement; 0 leaves it out.
        progress: Called with the number of pairs finished since its last call.

    Raises:
        UserError: No image or no phrase is left.
    """
    if not models or (teacher is not None and teacher not in models):
        raise ValueError(f"the teacher {teacher!r} has to be one of the models: {', '.join(models) or 'none given'}")
    concepts = _readable(some_images(concepts, images), models)
    found: dict[str, Found] = {name: {} for name in models}
    skipped: dict[BadInput, None] = {}  # without duplicates: an image with many phrases is read several times
    with _evaluating(models):
        for batch in _batches(concepts, batch_size):
            asked = [(picture, pairs) for path, pairs in batch if (picture := _read(path, pairs, skipped)) is not None]
            for name, model in models.items():
                if asked:
                    found[name].update(_ask(model, asked, geometry, threshold, concepts.category))
            if progress is not None:
                progress(sum(len(pairs) for _, pairs in batch))
        done = next(iter(found.values()))
        if not done:
            raise UserError(f"no image could be read, {len(skipped)} skipped: {': '.join(next(iter(skipped)))}")
        concepts = replace(concepts, pairs=tuple(pair for pair in concepts.pairs if pair.id in done))
        result = score_files(found, concepts, teacher=teacher, threshold=threshold, pictures=pictures)
        took, conditions = _latency(models, concepts.pairs[0].text, repeats) if repeats else ({}, None)
    rows = (replace(r, parameters=parameters(models[r.name].model), latency_ms=took.get(r.name)) for r in result.rows)
    leave_out(skipped)
    return replace(result, rows=tuple(rows), conditions=conditions, skipped=(*result.skipped, *skipped))


def score_files(
    found: Mapping[str, Found],
    concepts: ConceptSet,
    *,
    teacher: str | None = None,
    threshold: float = SCORE_THRESHOLD,
    pictures: int = 0,
    iou: IouKind = "masks",
) -> ConceptResult:
    """Compute the figures of stored predictions (see ``data.saco_predictions.load_predictions``) without a model.

    Mask AP is computed only if masks are compared and there is a single annotator.

    Raises:
        UserError: ``check_predictions`` refuses the predictions.
    """
    annotators = len(concepts.categories)
    ranked = annotators == 1 and iou == "masks"
    scores = {name: score_images(concepts, each, threshold, iou) for name, each in found.items()}
    figures = {name: ConceptScores.merge(each.values()).summary() for name, each in scores.items()}
    best = figures[teacher]["cgf1"] if teacher is not None else 0.0
    rows = [
        ConceptRow(
            name,
            *(figures[name][field] for field in ("cgf1", "pmf1", "il_mcc", "f1_50", "f1_75")),
            mask_ap=mask_ap(concepts, each).get("ap") if ranked else None,
            kept=figures[name]["cgf1"] / best if name != teacher and best > 0 else None,
        )
        for name, each in found.items()
    ]
    chosen = _shown(concepts, pictures)
    unused = (
        BadInput(f"{name}: {bad.key}", bad.reason)
        for name, each in found.items()
        for bad in unused_predictions(concepts, each)
    )
    skipped = (*concepts.problems, *unused)
    leave_out(skipped)
    return ConceptResult(
        rows=tuple(rows),
        teacher=teacher,
        threshold=threshold,
        images=len(concepts.by_image()),
        questions=len(concepts.pairs),
        positives=sum(bool(pair.rles) for pair in concepts.pairs),
        conditions=None,
        skipped=skipped,
        pictures=tuple(_picture(concepts, pair, found, threshold) for pair in chosen),
        predictions=found,
        figures=figures,
        annotators=annotators,
        iou=iou,
        scores=scores,
    )


@contextmanager
def _evaluating(models: Mapping[str, ConceptModel]) -> Iterator[None]:
    """Set the models to eval mode, and restore their training modes afterwards."""
    training = {name: model.model.training for name, model in models.items()}
    for model in models.values():
        model.model.eval()
    try:
        yield
    finally:
        for name, model in models.items():
            model.model.train(training[name])


def _readable(concepts: ConceptSet, models: Mapping[str, ConceptModel]) -> ConceptSet:
    """Remove phrases that a model cannot read, and list them in ``problems``."""
    bad = {}
    for text in {pair.text: None for pair in concepts.pairs}:
        for name, model in models.items():
            if (why := model.words.problem(text, f"that {name}")) is not None:
                bad[text] = BadInput(repr(text), why)
    pairs = tuple(pair for pair in concepts.pairs if pair.text not in bad)
    if not pairs:
        raise UserError(f"no phrase is left to evaluate: {': '.join(next(iter(bad.values())))}")
    return replace(concepts, pairs=pairs, problems=(*concepts.problems, *bad.values()))


def _batches(concepts: ConceptSet, batch_size: int) -> Iterator[list[tuple[Path, list[ConceptPair]]]]:
    """Batch images with their pairs: at most ``batch_size`` images and ``AT_ONCE`` pairs. Longer lists are split."""
    batch: list[tuple[Path, list[ConceptPair]]] = []
    for path, pairs in concepts.by_image().items():
        for start in range(0, len(pairs), AT_ONCE):
            piece = pairs[start : start + AT_ONCE]
            if batch and (len(batch) == batch_size or sum(len(p) for _, p in batch) + len(piece) > AT_ONCE):
                yield batch
                batch = []
            batch.append((path, piece))
    if batch:
        yield batch


def _read(path: Path, pairs: Sequence[ConceptPair], skipped: dict[BadInput, None]) -> Image.Image | None:
    try:
        picture = read_image(path)
    except UnreadableImage as error:
        skipped[BadInput(str(path), str(error))] = None
        return None
    size = (picture.height, picture.width)
    for pair in pairs:
        if (pair.height, pair.width) != size:
            why = size_problem(f"its question {pair.id}", (pair.height, pair.width), size)
            skipped[BadInput(str(path), why)] = None
            return None
    return picture


def _ask(
    model: ConceptModel, asked: Sequence[tuple[Image.Image, list[ConceptPair]]], geometry: str | None, threshold: float,
    category: int,
) -> Found:  # fmt: skip
    """Return a model's predictions for the pairs of a few images, run-length encoded at the size of each image.

    Kept are all predictions with at least ``threshold``, and the best ``MOST`` regardless of their score.
    """
    place = canvas_of(model, geometry)
    laid = [lay(picture, place, pairs[0].file_name) for picture, pairs in asked]
    questions = [(number, pair) for number, (_, pairs) in enumerate(asked) for pair in pairs]
    prompts = ConceptPrompts.words([p.text for _, p in questions], [n for n, _ in questions])
    output = model.answer(image_batch(laid), prompts)
    side, found = (model.image_size, model.image_size), Found()
    for row, (number, pair) in enumerate(questions):
        most = max(MOST, int((output.scores[row] >= threshold).sum()))
        answer = detections(output, row, 0.0, laid[number].size, side, laid[number].original, most=most)
        scored = zip(answer.scores.tolist(), answer.masks, strict=True)
        found[pair.id] = [PredictedInstance(score, to_rle(mask.cpu().numpy()), category) for score, mask in scored]
    return found


def _latency(
    models: Mapping[str, ConceptModel], phrase: str, repeats: int, seconds: float = 120.0
) -> tuple[dict[str, float], Conditions]:
    """Return the median latency of one pair with ``phrase`` in milliseconds, by model.

    The models take turns, so that a change in the machine's speed affects all. A warm-up run of each is not counted. No
    new round begins after ``seconds``.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    prompts = ConceptPrompts.words([phrase], [0])
    begun = time.perf_counter()
    for done in range(repeats + 1):
        if done > 1 and time.perf_counter() - begun > seconds:
            break
        for name, model in models.items():
            image = ImageBatch.full(torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8))
            start = time.perf_counter()
            model.answer(image, prompts).pred_masks.cpu()  # the copy waits until an accelerator has finished
            times[name].append(time.perf_counter() - start)
    first = next(iter(models.values()))
    on = device_name(next(first.model.parameters()).device)
    rounds = len(next(iter(times.values()))) - 1
    conditions = Conditions(on, torch.get_num_threads(), rounds, first.image_size)
    return {name: 1e3 * statistics.median(took[1:]) for name, took in times.items()}, conditions


def _shown(concepts: ConceptSet, wanted: int) -> list[ConceptPair]:
    """Select pairs for the pictures, evenly spread. A third of them, at least one, is negative."""
    there = [pair for pair in concepts.pairs if pair.rles]
    absent = [pair for pair in concepts.pairs if not pair.rles]
    few = evenly(absent, min(len(absent), -(-wanted // 3)))
    return [*evenly(there, wanted - len(few)), *few]


def _picture(concepts: ConceptSet, pair: ConceptPair, found: Mapping[str, Found], threshold: float) -> Picture:
    """Draw an image, its ground truth, and each model's instances with at least ``threshold`` and their scores."""
    picture = read_image(concepts.path(pair))
    scale = SIDE / max(picture.size)
    across, down = (max(1, round(side * scale)) for side in picture.size)
    image = np.asarray(picture.resize((across, down), Image.Resampling.BICUBIC))
    kept = {name: [p for p in each.get(pair.id, ()) if p.score >= threshold] for name, each in found.items()}
    there = _drawn(image, pair.rles, [""] * len(pair.rles))
    panels = [Panel("image", image), Panel(GROUND_TRUTH, there, found=len(pair.rles))]
    for name, best in kept.items():
        drawn = _drawn(image, [p.rle for p in best], [f"{p.score:.2f}" for p in best])
        panels.append(Panel(name, drawn, found=len(best)))
    return Picture(pair.file_name, pair.text, GROUND_TRUTH, tuple(panels))


def _drawn(image: np.ndarray, rles: Sequence[Rle], labels: Sequence[str]) -> np.ndarray:
    """Draw masks with the tight boxes computed from them. Boxes in prediction files may not match the masks."""
    if not rles:
        return image
    masks = torch.from_numpy(coco_mask.decode(list(rles)).transpose(2, 0, 1).astype(bool))
    across, down = image.shape[1] / masks.shape[2], image.shape[0] / masks.shape[1]
    boxes = masks_to_boxes(masks) * torch.tensor([across, down, across, down])
    return draw_instances(image, masks, boxes, labels)
