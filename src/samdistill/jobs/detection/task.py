"""Detection distillation: a student learns SAM 3's answers to questions, and its features.

The teacher runs during training, because its answers depend on image and question and are much larger than both. Its
feature pyramid depends on the image only and can be cached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...checkpoints.words import Words
from ...data import BadInput, leave_out
from ...data.questions import QuestionItem, collate_questions
from ...engine.held_out import held_out_terms
from ...engine.task import Phase, Task
from ...ops.images import normalise
from ...ops.matching import MatchCost, match
from ...teachers import Maps, MapSignals, RunningMaps, Sam3Detector
from ...types import ConceptPrompts, ImageBatch, Term, Terms
from .config import FEATURES, DetectionRunConfig
from .losses import FEATURE_TERMS, OUTPUT_TERMS, feature_terms, fpn_term, output_terms
from .scales import ITEMS, PER_PASS, Scales
from .student import StudentKind


@dataclass(frozen=True)
class DetectionBatch:
    """Images and questions.

    Attributes:
        images: The images, uint8.
        prompts: The questions.
        teacher_features: What a loader worker read of the teacher's feature pyramid.
        bad: Inputs that were unusable.
    """

    images: ImageBatch
    prompts: ConceptPrompts
    teacher_features: Maps = ()
    bad: tuple[BadInput, ...] = ()


class DetectionTask(Task[DetectionBatch]):
    """Terms between the answers of two detectors to the same questions."""

    leaves_unused = True  # a batch without boxes does not use the box encoder

    def __init__(
        self, config: DetectionRunConfig, teacher: Sam3Detector, kind: StudentKind, pyramid: MapSignals, words: Words,
        questions: Callable[[int], Dataset[QuestionItem]], held_out: Dataset[QuestionItem] | None = None,
    ) -> None:  # fmt: skip
        """Set up the task.

        Args:
            config: Configuration of the run.
            teacher: The teacher.
            kind: The kind of student.
            pyramid: The teacher's feature pyramid, running or cached, for phases with ``fpn`` only.
            words: The student's tokenizer.
            questions: Function from an epoch to its questions.
            held_out: Questions whose terms are logged after every epoch, or None.
        """
        self.config, self.teacher, self.kind, self.pyramid, self.words = config, teacher, kind, pyramid, words
        self.taught_by = teacher.fingerprint
        self.questions, self.held_out = questions, held_out
        self._scales: Scales | None = None

    def build_student(self) -> nn.Module:
        return self.kind.build(self.teacher)

    def export(self, student: nn.Module) -> nn.Module:
        return self.kind.export(student)

    def dataset(self, epoch: int) -> Dataset[QuestionItem]:
        return self.questions(epoch)

    def collate(self, items: Sequence[QuestionItem], phase: Phase = Phase()) -> DetectionBatch:
        images, prompts, bad = collate_questions(items)
        read = self.pyramid.read(images) if self._of_features(phase) else ()
        return DetectionBatch(images, prompts, read, tuple(bad))

    def to(self, batch: DetectionBatch, device: torch.device) -> DetectionBatch:
        self.pyramid.to(device)
        leave_out(batch.bad)
        return DetectionBatch(batch.images.to(device), batch.prompts.to(device), batch.teacher_features, batch.bad)

    def counts(self, batch: DetectionBatch) -> dict[str, int]:
        """Return the number of questions, and for ``fpn`` of images."""
        return dict.fromkeys(self.config.loss.named, len(batch.prompts)) | {"fpn": len(batch.images)}

    def terms(self, student: nn.Module, batch: DetectionBatch, phase: Phase = Phase()) -> Terms:
        """Return the terms of the phase, and others that need no additional work.

        In a phase with ``fpn`` only, just the two vision encoders run.
        """
        device = batch.images.images.device
        pixels = normalise(batch.images.images, self.kind.mean, self.kind.std)
        wanted = phase.wanted(self.config.loss.named)
        if self._of_features(phase):
            scales = self.scales(device)
            levels = student(pixel_values=pixels).fpn_hidden_states
            with torch.autocast(device.type, enabled=False):
                taught = self.pyramid.answer(batch.images, batch.teacher_features)
                return self._weighted({"fpn": fpn_term(scales.levels(levels), scales.levels(taught))})
        teacher = self.teacher.to(device).answer(batch.images, batch.prompts)
        asked = self.words.inputs(batch.prompts, device)
        found = student(pixel_values=pixels, prompt_images=batch.prompts.image, **asked).answer()
        with torch.autocast(device.type, enabled=False):  # losses are float32 in any precision
            pairs = self.config.match
            cost = MatchCost(pairs.mask, pairs.box, pairs.logit, pairs.resolution, pairs.floor)
            matches = match(found, teacher, cost, pairs.method)
            loss = self.config.loss
            outputs = [name for name in loss.named if name in OUTPUT_TERMS]
            values = output_terms(found, teacher, matches, loss.unmatched, outputs)
            if wanted & set(FEATURE_TERMS):
                scales, names = self.scales(device), [name for name in loss.named if name in FEATURE_TERMS]
                values |= feature_terms(scales.of(found), scales.of(teacher), names)
        return self._weighted(values)

    def scales(self, device: torch.device) -> Scales:
        """Return the units of features, measured once on the first images of the run, the same on every rank."""
        if self._scales is None and self.config.loss.standardise:
            data, teacher = self.questions(0), self.teacher.to(device)
            items = [data[index] for index in range(min(ITEMS, len(data)))]  # type: ignore[arg-type]
            parts = (collate_questions(items[first : first + PER_PASS]) for first in range(0, len(items), PER_PASS))
            self._scales = Scales.measure(teacher.answer(images, prompts) for images, prompts, _ in parts)
        return self._scales or Scales()

    def _of_features(self, phase: Phase) -> bool:
        """Whether the phase trains on the teacher's feature pyramid only."""
        return phase.wanted(self.config.loss.named) == FEATURES

    def _weighted(self, values: Mapping[str, Tensor]) -> Terms:
        return Terms({name: Term(value, self.config.loss.weight(name)) for name, value in values.items()})

    @torch.no_grad()
    def validate(self, student: nn.Module, phase: Phase = Phase()) -> dict[str, float]:
        """Return the trained terms and their weighted total on a few batches of held-out questions.

        The teacher runs, because held-out images are not cached.
        """
        if self.held_out is None:
            return {}
        task, wanted = copy(self), phase.wanted(self.config.loss.named)
        task.pyramid = RunningMaps(self.teacher, self.teacher.features)
        return held_out_terms(task, self.held_out, self.config.evaluate.batch_size, student, wanted, phase)
