"""Evaluation of teacher, untrained and distilled detector on held-out questions."""

from __future__ import annotations

import torch

from ...data.concept_questions import concepts_of
from ...data.saco import ConceptSet, find_concepts
from ...dist import default_device
from ...evaluation.concept_result import ConceptResult
from ...evaluation.concepts import evaluate_concepts, some_images
from ...inference.concepts import load_concept_model
from ...progress import Progress
from ..base import DISTILLED, TEACHER, UNTRAINED
from .config import DetectionRunConfig
from .parts import DetectionParts


def evaluate(config: DetectionRunConfig) -> ConceptResult | None:
    """Evaluate teacher, untrained and distilled student on the held-out questions of a finished run.

    Without a file of questions, they are made from masks and names of the held-out images. None if there are none.
    """
    settings = config.evaluate
    listing = settings.concepts or find_concepts(config.data.root)
    parts, device = DetectionParts(config), default_device()
    if listing is None:
        concepts = concepts_of(parts.held_out_source(), settings.images, config.data.seed)
    else:
        concepts = some_images(ConceptSet.load(listing), settings.images)
    if concepts is None:
        return None
    torch.manual_seed(config.train.seed)
    untrained = parts.task().build_student().to(device).eval()  # same seed as in training, without any step
    models = {
        TEACHER: load_concept_model(config.teacher.path, config.teacher.image_size, device),
        UNTRAINED: parts.kind.detector(untrained, parts.words),
        DISTILLED: load_concept_model(config.output, device=device),
    }
    with Progress("evaluating", len(concepts.pairs), "questions") as bar:
        return evaluate_concepts(
            models, concepts, teacher=TEACHER, geometry=config.data.geometry, threshold=settings.threshold,
            batch_size=settings.batch_size, progress=bar.advance,
        )  # fmt: skip
