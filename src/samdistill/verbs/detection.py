"""The detection job's parts: one teacher, two tokenizers, and the questions of every epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from ..checkpoints.words import Words
from ..config import DetectionRunConfig
from ..data.questions import PhraseBook, QuestionDataset
from ..data.skipped import BadInput, leave_out
from ..data.sources import survey
from ..engine.frozen_norm import batch_norms
from ..students import EfficientSam3Model
from ..tasks.detection import DetectionTask, student_config
from ..teachers import DetectorInfo, Sam3Detector, describe_detector
from ..types import UserError
from .assembly import Images


class DetectionAssembly(Images[DetectionRunConfig]):
    """Lazily built parts of one detection run; cheap until a part that reads data or weights is asked for."""

    @cached_property
    def teacher_info(self) -> DetectorInfo:
        return describe_detector(self.config.teacher)

    @property
    def image_size(self) -> int:
        return self.teacher_info.image_size

    @cached_property
    def teacher(self) -> Sam3Detector:
        return Sam3Detector(self.config.teacher, torch.device("cpu"))

    @cached_property
    def words(self) -> Words:
        """The student's: the teacher's tokenizer in the student's own context."""
        words = self.teacher.words
        return Words(words.tokenizer, min(words.context, self.config.student.text.context))

    def book(self, held_out: bool = False) -> PhraseBook:
        """What both models can be asked; phrases longer than either context are left out."""
        source = self.held_out_source() if held_out else self.train_source
        readers = self.teacher.words, self.words
        return PhraseBook(self.config.questions, source, lambda text: all(words.fits(text) for words in readers))

    def task(self) -> DetectionTask:
        """The job on all its images; the terms are also measured on questions about the held-out ones."""
        book, seed = self.book(), self.config.data.seed
        leave_out([*book.dropped, *book.unasked], seen_by_all=True)
        views = self.config.train.total_epochs  # the teacher is online: every epoch sees another view
        held_out = self._held_out()

        def questions(epoch: int) -> QuestionDataset:
            return QuestionDataset(book, self.transform, seed, epoch, views)

        return DetectionTask(self.config, self.teacher, self.words, questions, held_out)

    def _held_out(self) -> QuestionDataset | None:
        """Questions about held-out images; None where a file of phrases speaks of the training images alone."""
        try:
            return QuestionDataset(self.book(held_out=True), self.transform, self.config.data.seed)
        except UserError:
            if self.config.questions.source != "jsonl":
                raise
            return None


@dataclass(frozen=True)
class DetectionPlan:
    """Sizes in bytes. parts: parameters of the student by module. levels: sides of the maps the heads read.
    batch_norms: layers of batch norm."""

    teacher: str
    teacher_params: int
    image_size: int
    teacher_queries: int
    teacher_levels: tuple[int, ...]
    student: str
    student_params: int
    parts: dict[str, int]
    student_fp16_bytes: int
    queries: int
    images: int
    held_out_images: int
    questions_per_image: int
    phases: tuple[tuple[str, int], ...]
    weights_and_optimiser_bytes: int
    teacher_bytes: int
    batch_norms: int
    steps_per_epoch: int
    steps: int
    skipped: tuple[BadInput, ...] = ()
    """Inputs that the run will leave out."""

    @property
    def trained_on(self) -> str:
        return f"{self.images} images"

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"skipped": [bad._asdict() for bad in self.skipped]}


def plan_detection(config: DetectionRunConfig) -> DetectionPlan:
    """What a run will need; reads configs and lists files, loads no weights and decodes no image.

    images: those that something can be asked about; phrases too long for a text encoder are not known yet.
    """
    parts = DetectionAssembly(config)
    info, train = parts.teacher_info, config.train
    with torch.device("meta"):
        student = EfficientSam3Model(student_config(config, info))
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in student.named_children()}
    params, images = sum(sizes.values()), len(PhraseBook(config.questions, survey(parts.train_source)).keys)
    per_epoch = images // train.batch_size
    copies = 4 + (1 if train.ema else 0)  # weights, gradients, two Adam moments, weight average
    half = 2 if config.teacher.precision != "fp32" else 4
    return DetectionPlan(
        teacher=config.teacher.path, teacher_params=info.params, image_size=info.image_size,
        teacher_queries=info.queries, teacher_levels=tuple(info.levels), student=config.student.backbone,
        student_params=params, parts=sizes, student_fp16_bytes=2 * params, queries=config.student.queries,
        images=images, held_out_images=len(survey(parts.held_out_source()).keys),
        questions_per_image=config.questions.per_image,
        phases=tuple((phase.name, phase.epochs * per_epoch) for phase in train.phases or ()),
        weights_and_optimiser_bytes=params * 4 * copies, teacher_bytes=half * info.params,
        batch_norms=batch_norms(student), steps_per_epoch=per_epoch, steps=per_epoch * train.total_epochs,
    )  # fmt: skip
