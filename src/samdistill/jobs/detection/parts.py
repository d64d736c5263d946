"""The detection job's parts: one teacher, two tokenizers, and the questions of every epoch."""

from __future__ import annotations

from functools import cached_property

import torch

from ...checkpoints.words import Words
from ...data.questions import PhraseBook, QuestionDataset
from ...data.skipped import leave_out
from ...teachers import DetectorInfo, Sam3Detector, describe_detector
from ...types import UserError
from ..images import Images
from .config import DetectionRunConfig
from .task import DetectionTask


class DetectionParts(Images[DetectionRunConfig]):
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
