"""Detection distillation: a student learns SAM 3's answers to questions, and its features.

The teacher runs during training, because its answers depend on image and question and are much larger than both. Its
feature pyramid depends on the image only and can be cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...checkpoints.words import Words
from ...data import BadInput, leave_out
from ...data.labels import collate_labels
from ...data.questions import QuestionItem, collate_questions
from ...engine.held_out import held_out_terms
from ...engine.task import Phase, Task
from ...ops.images import normalise
from ...ops.matching import match
from ...registry import TermTable
from ...teachers import Maps, MapSignals, RunningMaps, Sam3Detector
from ...types import ConceptPrompts, DetectorOutput, ImageBatch, QuestionLabels, Term, Terms, UserError
from .calibration import calibrate
from .config import FPN, TRUNK, DetectionRunConfig, only_map
from .label_terms import label_counts, label_terms
from .losses import FEATURE_TERMS, OUTPUT_TERMS, feature_terms, fpn_term, output_terms
from .scales import ITEMS, PER_PASS, Scales
from .student import StudentKind


@dataclass(frozen=True)
class DetectionBatch:
    """Images and questions.

    Attributes:
        images: The images, uint8.
        prompts: The questions.
        teacher_maps: What a loader worker read of the teacher's maps.
        bad: Inputs that were unusable.
        labels: Labels of the questions, in a phase with terms of labels.
    """

    images: ImageBatch
    prompts: ConceptPrompts
    teacher_maps: Maps = ()
    bad: tuple[BadInput, ...] = ()
    labels: QuestionLabels | None = None


def running_maps(teacher: Sam3Detector, term: str) -> RunningMaps:
    """Return the teacher's maps that ``term`` compares, ``FPN`` or ``TRUNK``."""
    return RunningMaps(teacher, teacher.trunk if term == TRUNK else teacher.features)


UNASKED = "calibration.images: questions.file has no phrase of a held-out image; add some, or set 0"


class DetectionTask(Task[DetectionBatch]):
    """Terms between the answers of two detectors to the same questions."""

    leaves_unused = True  # a batch without boxes does not use the box encoder
    rebuilds_frozen = True

    def __init__(
        self, config: DetectionRunConfig, teacher: Sam3Detector, kind: StudentKind, maps: MapSignals, words: Words,
        questions: Callable[[int], Dataset[QuestionItem]], held_out: Dataset[QuestionItem] | None = None,
        label_side: int = 0,
    ) -> None:  # fmt: skip
        """Set up the task.

        Args:
            config: Configuration of the run.
            teacher: The teacher.
            kind: The kind of student.
            maps: The teacher's maps of images, running or cached, for phases with ``fpn`` or ``trunk`` only.
            words: The student's tokenizer.
            questions: Function from an epoch to its questions.
            held_out: Questions whose terms are logged after every epoch, or None.
            label_side: Side of the masks of labels.
        """
        self.config, self.teacher, self.kind, self.maps, self.words = config, teacher, kind, maps, words
        self.taught_by = teacher.fingerprint
        self.questions, self.held_out, self.label_side = questions, held_out, label_side
        self._scales: Scales | None = None
        if config.calibration.images and held_out is None:
            raise UserError(UNASKED)

    def build_student(self) -> nn.Module:
        return self.kind.build(self.teacher)

    def export(self, student: nn.Module) -> nn.Module:
        return self.kind.export(student)

    def finish(self, student: nn.Module) -> None:
        """Calibrate the scores on questions about held-out images, with ``calibration.images``."""
        if count := self.config.calibration.images:
            detector, teacher = self.kind.detector(student.eval(), self.words), self.teacher
            calibrate(detector, teacher.to(detector.model.device), self.held_out_questions(count), self.config.match)

    def held_out_questions(self, images: int) -> Iterator[tuple[ImageBatch, ConceptPrompts]]:
        """Yield the questions about the first held-out images, in batches."""
        data, size = self.held_out, self.config.evaluate.batch_size
        assert data is not None
        count = min(images, len(data))  # type: ignore[arg-type]
        for first in range(0, count, size):
            batch, prompts, _ = collate_questions([data[index] for index in range(first, min(first + size, count))])
            yield batch, prompts

    def dataset(self, epoch: int) -> Dataset[QuestionItem]:
        return self.questions(epoch)

    def collate(self, items: Sequence[QuestionItem], phase: Phase = Phase()) -> DetectionBatch:
        images, prompts, bad = collate_questions(items)
        read = self.maps.read(images) if self._map_term(phase) else ()
        labels = None
        if not phase.wanted(self.config.loss.named).isdisjoint(self.config.label_names):
            labels = collate_labels([asked.labels for _, questions, _ in items for asked in questions], self.label_side)
        return DetectionBatch(images, prompts, read, tuple(bad), labels)

    def to(self, batch: DetectionBatch, device: torch.device) -> DetectionBatch:
        leave_out(batch.bad)
        labels = None if batch.labels is None else batch.labels.to(device)
        return DetectionBatch(batch.images.to(device), batch.prompts.to(device), batch.teacher_maps, batch.bad, labels)

    def counts(self, batch: DetectionBatch) -> dict[str, int]:
        """Return the number of questions, for ``fpn`` and ``trunk`` of images, for labels of questions with them."""
        images = len(batch.images)
        found = dict.fromkeys(self.config.loss.named, len(batch.prompts)) | {FPN: images, TRUNK: images}
        if batch.labels is not None:
            found |= label_counts(batch.labels, self.config.label_names)
        return found

    def terms(self, student: nn.Module, batch: DetectionBatch, phase: Phase = Phase()) -> Terms:
        """Return the terms of the phase, and others that need no additional work.

        In a phase with ``fpn`` only, just the two vision encoders run, with ``trunk`` only just their trunks. With
        terms of labels only, the teacher does not run.
        """
        device = batch.images.images.device
        pixels = normalise(batch.images.images, self.kind.mean, self.kind.std)
        if (term := self._map_term(phase)) is not None:
            self.maps.to(device)
            scales, found = self.scales(device), self.kind.maps(student, pixels, term)
            with torch.autocast(device.type, enabled=False):
                taught = self.maps.answer(batch.images, batch.teacher_maps)
                value = fpn_term(scales.maps(found, term), scales.maps(taught, term))  # the mean over one or three maps
                return self._weighted({term: value})
        asked, text = self.words.inputs(batch.prompts, device), None
        asks_teacher = self._wanted(phase, OUTPUT_TERMS, FEATURE_TERMS)
        if asks_teacher and self.kind.shares_text(phase.epoch):
            asked["text_features"] = text = self.teacher.to(device).text(batch.prompts)
        teacher = self.teacher.to(device).answer(batch.images, batch.prompts, text) if asks_teacher else None
        found = student(pixel_values=pixels, prompt_images=batch.prompts.image, **asked).answer()
        with torch.autocast(device.type, enabled=False):  # losses are float32 in any precision
            values = {} if teacher is None else self._teacher_terms(found, teacher, phase)
            if batch.labels is not None:
                values |= label_terms(found, batch.labels, self.config.match.cost, self.config.label_names)
        return self._weighted(values)

    def _teacher_terms(self, found: DetectorOutput, teacher: DetectorOutput, phase: Phase) -> dict[str, Tensor]:
        """Return the terms between the answers of both models, and those of features in a phase with one of them."""
        loss, pairs = self.config.loss, self.config.match
        matches = match(found, teacher, pairs.cost, pairs.method)
        outputs = [name for name in loss.named if name in OUTPUT_TERMS]
        values = output_terms(found, teacher, matches, loss.unmatched, outputs)
        if self._wanted(phase, FEATURE_TERMS):
            scales, names = self.scales(found.pred_masks.device), [n for n in loss.named if n in FEATURE_TERMS]
            values |= feature_terms(scales.of(found), scales.of(teacher), names)
        return values

    def scales(self, device: torch.device) -> Scales:
        """Return the units of features, measured once on the first images of the run, the same on every rank."""
        if self._scales is None and self.config.loss.standardise:
            data, teacher = self.questions(0), self.teacher.to(device)
            items = [data[index] for index in range(min(ITEMS, len(data)))]  # type: ignore[arg-type]
            parts = (collate_questions(items[first : first + PER_PASS]) for first in range(0, len(items), PER_PASS))
            self._scales = Scales.measure(teacher.answer(images, prompts) for images, prompts, _ in parts)
        return self._scales or Scales()

    def _wanted(self, phase: Phase, *tables: TermTable) -> bool:
        """Return whether a term of ``tables`` is trained in a phase."""
        wanted = phase.wanted(self.config.loss.named)
        return any(name in table for name in wanted for table in tables)

    def _map_term(self, phase: Phase) -> str | None:
        return only_map(phase.wanted(self.config.loss.named))

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
        task.maps = running_maps(self.teacher, self.config.maps)
        return held_out_terms(task, self.held_out, self.config.evaluate.batch_size, student, wanted, phase)
