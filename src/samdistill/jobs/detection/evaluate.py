"""Teacher, untrained and distilled detector on held-out questions."""

from __future__ import annotations

import torch

from ...data.saco import ConceptSet, find_concepts
from ...dist import default_device
from ...evaluation.concepts import ConceptResult, evaluate_concepts, some_images
from ...inference.concepts import StudentDetector, load_concept_model
from ...progress import Progress
from ...types import UserError
from ..base import STUDENT, TEACHER, UNTRAINED
from .config import DetectionRunConfig
from .parts import DetectionParts


def evaluate(config: DetectionRunConfig) -> ConceptResult:
    """Teacher, untrained and distilled student on the held-out questions of a finished run."""
    settings = config.evaluate
    listing = settings.concepts or find_concepts(config.data.root)
    if listing is None:
        raise UserError(
            f"{config.data.root}: no held-out questions (concepts_val.json); give evaluate.concepts a SA-Co file"
        )
    concepts = some_images(ConceptSet.load(listing), settings.images)
    parts, device = DetectionParts(config), default_device()
    torch.manual_seed(config.train.seed)
    untrained = parts.task().build_student().to(device).eval()  # as the training found it: same seed, no step
    models = {
        TEACHER: load_concept_model(config.teacher.path, config.teacher.image_size, device),
        UNTRAINED: StudentDetector(untrained, parts.words),
        STUDENT: load_concept_model(config.output, device=device),
    }
    with Progress("evaluating", len(concepts.pairs), "questions") as bar:
        return evaluate_concepts(
            models, concepts, teacher=TEACHER, geometry=config.data.geometry, threshold=settings.threshold,
            batch_size=settings.batch_size, progress=bar.advance,
        )  # fmt: skip
