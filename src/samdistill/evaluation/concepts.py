"""Detectors side by side on pairs of image and phrase: cgF1 and its factors, mask AP, size, speed, pictures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
from ..metrics.concepts import SCORE_THRESHOLD
from ..ops.masks import masks_to_boxes
from ..types import ConceptPrompts, ImageBatch, UserError
from .concept_files import mask_ap, score_predictions
from .latency import device_name, parameters
from .pictures import GROUND_TRUTH, SIDE
from .result import DASH, Conditions, Evaluation, Measure, Panel, Picture, count
from .result_story import CONCEPT_NOTE, Tile, concept_headline, concept_tiles
from .rows import ConceptRow
from .verdict import Score

MOST = 100
"""Predictions kept of a question beside those that count, as COCO's average precision ranks them."""
Found = dict[int, list[PredictedInstance]]
"""What a model found, best first, by the id of the pair."""


@dataclass(frozen=True)
class ConceptResult(Evaluation[ConceptRow]):
    """Rows in the order the models were given, and what they were measured on.

    positives: how many of the ``questions`` ask for something that is there. threshold: of the score, for all but
    ``mask_ap``. skipped: inputs that could not be used, with the reason. predictions: by model, for
    ``data.saco_predictions.write_predictions``. figures: by model, all of ``ConceptScores.summary``. annotators: how
    many files of ground truth; the best counts, pair by pair. iou: what was compared.
    """

    rows: tuple[ConceptRow, ...]
    teacher: str | None
    threshold: float
    images: int
    questions: int
    positives: int
    conditions: Conditions | None
    skipped: tuple[BadInput, ...]
    pictures: tuple[Picture, ...]
    predictions: Mapping[str, Found]
    figures: Mapping[str, Mapping[str, float]]
    annotators: int = 1
    iou: IouKind = "masks"

    pictures_note = (
        "Questions spread over the file, the last for something that is not there. Boxes are drawn around the masks; "
        "colours go by score, the same for every model."
    )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and mappings; everything but the pictures and the predictions."""
        return {
            "teacher": self.teacher,
            "threshold": self.threshold,
            "images": self.images,
            "questions": self.questions,
            "positives": self.positives,
            "annotators": self.annotators,
            "iou": self.iou,
            "figures": {name: dict(each) for name, each in self.figures.items()},
            "models": [asdict(row) for row in self.rows],
            "timing": None if self.conditions is None else asdict(self.conditions),
            "skipped": [{"key": bad.key, "reason": bad.reason} for bad in self.skipped],
        }

    def measures(self) -> list[Measure]:
        """What was measured, in reading order; each with one text per model. What no model has is left out."""

        def line(group: str, name: str, field: str, form: str, scale: float = 1.0, unit: str = "") -> Measure:
            values = [getattr(row, field) for row in self.rows]
            return Measure(group, name, [DASH if v is None else format(v * scale, form) + unit for v in values])

        found = [
            line("cost", "parameters", "parameters", ".2f", 1e-6, " M"),
            line("cost", "latency per question", "latency_ms", ".3g", 1.0, " ms"),
            line("concepts", "cgF1", "cgf1", ".3f"),
            line("concepts", "pmF1", "pmf1", ".3f"),
            line("concepts", "IL_MCC", "il_mcc", ".3f"),
            line("concepts", "F1 at IoU 0.50", "f1_50", ".3f"),
            line("concepts", "F1 at IoU 0.75", "f1_75", ".3f"),
            line("concepts", "mask AP", "mask_ap", ".3f"),
            line("concepts", "share of the teacher's cgF1", "kept", ".1f", 100.0, " %"),
        ]
        return [measure for measure in found if any(cell != DASH for cell in measure.cells)]

    def caption(self) -> str:
        """One sentence on what the rows were measured on."""
        text = (
            f"{count(self.questions, 'question')} about {count(self.images, 'image')}, {self.positives} for something "
            f"that is there; scores from {self.threshold:g}"
        )
        if self.annotators > 1:
            text += f"; the best of {self.annotators} annotators counts"
        if self.iou == "boxes":
            text += "; boxes compared, not masks"
        if self.skipped:
            text += f"; {count(len(self.skipped), 'input')} skipped"
        if self.conditions is not None:
            on = self.conditions
            text += f"; latency: {on.device}, {count(on.threads, 'thread')}, median of {count(on.repeats, 'run')}"
        return text + "."

    @property
    def note(self) -> str:
        return CONCEPT_NOTE

    def score(self, name: str) -> Score:
        return Score("cgF1", self.row(name).cgf1, self.questions)

    def headline(self, student: str, start: str | None) -> str:
        return concept_headline(self.row(student), *self.compared(start))

    def tiles(self, student: str, start: str | None) -> list[Tile]:
        return concept_tiles(self.row(student), *self.compared(start))


def some_images(concepts: ConceptSet, images: int | None) -> ConceptSet:
    """The pairs of at most ``images`` images, spread over the file; None takes all."""
    if images is None:
        return concepts
    chosen = set(evenly(list(concepts.by_image()), images))
    return replace(concepts, pairs=tuple(pair for pair in concepts.pairs if concepts.path(pair) in chosen))


def evaluate_concepts(
    models: Mapping[str, ConceptModel],
    concepts: ConceptSet,
    *,
    teacher: str | None = None,
    geometry: str | None = None,
    threshold: float = SCORE_THRESHOLD,
    images: int | None = None,
    batch_size: int = 4,
    pictures: int = 6,
    repeats: int = 9,
    progress: Callable[[int], object] | None = None,
) -> ConceptResult:
    """Ask ``models`` every question of ``concepts``; each reads the images at its own size.

    teacher: the name of the model the others are compared with. threshold: scores from here on count, for all but mask
    AP, which ranks the best 100. images: at most so many, spread over the file. Each image is encoded once for up to
    ``AT_ONCE`` questions. Models answer where they are. repeats: timing rounds, 0 leaves latency out.
    progress: called with how many questions came to be done since its last call.

    Images that cannot be read, or are not of the size the file says, are skipped and listed, as are phrases too long
    for a model. Raises ``UserError`` where nothing is left.
    """
    if not models or (teacher is not None and teacher not in models):
        raise ValueError(f"the teacher {teacher!r} has to be one of the models: {', '.join(models) or 'none given'}")
    concepts = _readable(some_images(concepts, images), models)
    found: dict[str, Found] = {name: {} for name in models}
    skipped: dict[BadInput, None] = {}  # an image whose questions come in pieces is read and listed once more
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
        took, conditions = _latency(models, repeats) if repeats else ({}, None)
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
    """Compare predictions that were made before, as ``data.saco_predictions.load_predictions`` reads; without a model.

    Average precision is that of masks by a single annotator. Raises ``UserError`` for predictions that
    ``check_predictions`` refuses.
    """
    annotators = len(concepts.categories)
    ranked = annotators == 1 and iou == "masks"
    figures = {name: score_predictions(concepts, each, threshold, iou).summary() for name, each in found.items()}
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
    )


@contextmanager
def _evaluating(models: Mapping[str, ConceptModel]) -> Iterator[None]:
    """In eval mode; training modes are put back afterwards."""
    training = {name: model.model.training for name, model in models.items()}
    for model in models.values():
        model.model.eval()
    try:
        yield
    finally:
        for name, model in models.items():
            model.model.train(training[name])


def _readable(concepts: ConceptSet, models: Mapping[str, ConceptModel]) -> ConceptSet:
    """Without the phrases that do not fit into a model's context; they are listed among the problems."""
    bad = {}
    for text in {pair.text: None for pair in concepts.pairs}:
        for name, model in models.items():
            if not model.words.fits(text):
                bad[text] = BadInput(repr(text), f"longer than the {model.words.context} tokens {name} reads")
    pairs = tuple(pair for pair in concepts.pairs if pair.text not in bad)
    if not pairs:
        raise UserError(f"no question left to ask: {': '.join(next(iter(bad.values())))}")
    return replace(concepts, pairs=pairs, problems=(*concepts.problems, *bad.values()))


def _batches(concepts: ConceptSet, batch_size: int) -> Iterator[list[tuple[Path, list[ConceptPair]]]]:
    """Images with their questions, at most ``batch_size`` and ``AT_ONCE`` of them; a longer list comes in pieces."""
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
    """What the model finds for every question about a few images, as run lengths at each image's own size.

    All that scores ``threshold`` or more, and the best ``MOST`` whatever they score.
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
    models: Mapping[str, ConceptModel], repeats: int, seconds: float = 120.0
) -> tuple[dict[str, float], Conditions]:
    """Median milliseconds of one question about one image. The models take turns, so a drift of the machine is shared.

    One untimed run of each comes first; no new round begins after ``seconds``.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    prompts = ConceptPrompts.words(["object"], [0])
    begun = time.perf_counter()
    for done in range(repeats + 1):
        if done > 1 and time.perf_counter() - begun > seconds:
            break
        for name, model in models.items():
            image = ImageBatch.full(torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8))
            start = time.perf_counter()
            model.answer(image, prompts).pred_masks.cpu()  # brought here, so that an accelerator has finished
            times[name].append(time.perf_counter() - start)
    first = next(iter(models.values()))
    on = device_name(next(first.model.parameters()).device)
    rounds = len(next(iter(times.values()))) - 1
    conditions = Conditions(on, torch.get_num_threads(), rounds, first.image_size)
    return {name: 1e3 * statistics.median(took[1:]) for name, took in times.items()}, conditions


def _shown(concepts: ConceptSet, wanted: int) -> list[ConceptPair]:
    """Questions to draw: spread over the positive ones, and a third of them (one at least) negative."""
    there = [pair for pair in concepts.pairs if pair.rles]
    absent = [pair for pair in concepts.pairs if not pair.rles]
    few = evenly(absent, min(len(absent), -(-wanted // 3)))
    return [*evenly(there, wanted - len(few)), *few]


def _picture(concepts: ConceptSet, pair: ConceptPair, found: Mapping[str, Found], threshold: float) -> Picture:
    """The image, its ground truth, and every model's instances from ``threshold`` on with their scores."""
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
    """Masks with their own tight boxes: files of predictions hold no others that could be trusted."""
    if not rles:
        return image
    masks = torch.from_numpy(coco_mask.decode(list(rles)).transpose(2, 0, 1).astype(bool))
    across, down = image.shape[1] / masks.shape[2], image.shape[0] / masks.shape[1]
    boxes = masks_to_boxes(masks) * torch.tensor([across, down, across, down])
    return draw_instances(image, masks, boxes, labels)
