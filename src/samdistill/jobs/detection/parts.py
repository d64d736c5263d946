"""The detection job's parts: one teacher, two tokenizers, and the questions of every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch

from ...checkpoints.words import Words
from ...data.questions import PhraseBook, QuestionDataset
from ...data.skipped import leave_out
from ...data.sources import Source
from ...store import StoreSpec
from ...teachers import DetectorInfo, RunningMaps, Sam3Detector, describe_detector
from ...types import UserError
from ..caching import Specs
from ..views import ViewParts
from .config import DetectionRunConfig
from .task import DetectionTask


class DetectionParts(ViewParts[DetectionRunConfig]):
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
    def keys(self) -> Sequence[str]:
        """Images about which something can be asked."""
        return self.asked.keys

    def running(self) -> RunningMaps:
        return RunningMaps(self.teacher, self.teacher.features)

    def specs(self, fingerprint: str) -> Specs:
        info = self.teacher_info
        return {
            f"level{level}": StoreSpec(
                tap=f"fpn_level_{level}", shape=(info.hidden_size, side, side), image_size=info.image_size,
                teacher=fingerprint, transform=self.transform.fingerprint, codec=self.config.cache.codec,
            )
            for level, side in enumerate(info.levels)
        }  # fmt: skip

    @cached_property
    def words(self) -> Words:
        """The student's: the teacher's tokenizer in the student's own context."""
        words = self.teacher.words
        return Words(words.tokenizer, min(words.context, self.config.student.text.context))

    @cached_property
    def asked(self) -> PhraseBook:
        """What both models can be asked about the images to train on."""
        return self._book(self.train_source)

    def _book(self, source: Source) -> PhraseBook:
        """Phrases longer than either context are left out."""
        readers = self.teacher.words, self.words
        return PhraseBook(self.config.questions, source, lambda text: all(words.fits(text) for words in readers))

    def task(self, proven: bool = True) -> DetectionTask:
        """The job on all its images; the terms are also measured on questions about the held-out ones. proven: as in
        ``signals``."""
        book = self.asked
        leave_out([*book.dropped, *book.unasked], seen_by_all=True)
        pyramid, held_out = self.signals(proven), self._held_out()
        questions = partial(self._questions, book)
        return DetectionTask(self.config, self.teacher, pyramid, self.words, questions, held_out)

    def _questions(self, book: PhraseBook, epoch: int) -> QuestionDataset:
        """Every epoch sees another view, but for those that read a cache: they see its views in turn."""
        cached = not self.config.online and self.config.of_features(epoch)
        views = self.config.data.views if cached else self.config.train.total_epochs
        return QuestionDataset(book, self.transform, self.config.data.seed, epoch, views, self.trained_keys)

    def _held_out(self) -> QuestionDataset | None:
        """Questions about held-out images; None where a file of phrases speaks of the training images alone."""
        try:
            return QuestionDataset(self._book(self.held_out_source()), self.transform, self.config.data.seed)
        except UserError:
            if self.config.questions.source != "jsonl":
                raise
            return None
