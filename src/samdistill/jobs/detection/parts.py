"""Parts of a detection run: teacher, tokenizers, and questions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch

from ...checkpoints.words import Words
from ...data.labels import require_labels
from ...data.questions import PhraseBook, QuestionDataset
from ...data.skipped import leave_out
from ...data.sources import Source
from ...store import StoreSpec
from ...teachers import DetectorInfo, RunningMaps, Sam3Detector, describe_detector
from ...teachers.base import IMAGE_EMBEDDING
from ...teachers.sam3_text import text_words
from ...types import UserError
from ..caching import Specs
from ..views import ViewParts
from .config import TRUNK, DetectionRunConfig
from .student import StudentKind, student_kind
from .task import DetectionTask, running_maps


class DetectionParts(ViewParts[DetectionRunConfig]):
    """Parts of a detection run. Each is built on first access."""

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
        """Keys of the images with at least one question."""
        return self.asked.keys

    def running(self) -> RunningMaps:
        return running_maps(self.teacher, self.config.maps)

    def specs(self, fingerprint: str) -> Specs:
        info = self.teacher_info
        shapes = {f"level{level}": (info.hidden_size, side, side) for level, side in enumerate(info.levels)}
        taps = {name: name.replace("level", "fpn_level_") for name in shapes}
        if self.config.maps == TRUNK:
            shapes, taps = {TRUNK: (info.trunk_size, info.grid, info.grid)}, {TRUNK: IMAGE_EMBEDDING}
        return {
            name: StoreSpec(
                tap=taps[name], shape=shape, image_size=info.image_size, teacher=fingerprint,
                transform=self.transform.fingerprint, codec=self.config.cache.codec,
            )
            for name, shape in shapes.items()
        }  # fmt: skip

    @cached_property
    def words(self) -> Words:
        """The student's tokenizer: the teacher's with the student's context length."""
        words = text_words(self.config.teacher, self.teacher_info)
        return Words(words.tokenizer, min(words.context, self.kind.context))

    @cached_property
    def kind(self) -> StudentKind:
        """The kind of student."""
        return student_kind(self.config, self.teacher_info)

    @cached_property
    def asked(self) -> PhraseBook:
        """Phrases of the training images that both models can read."""
        return self._book(self.train_source)

    def _book(self, source: Source) -> PhraseBook:
        """Return the phrases of a source, without those that are longer than a model's context."""
        self.require_labels(source)
        readers = self.teacher.words, self.words
        return PhraseBook(self.config.questions, source, lambda text: all(words.fits(text) for words in readers))

    def require_labels(self, source: Source) -> None:
        """Raise ``UserError`` if the run has terms of labels, and the phrases of a source have no labels."""
        if names := self.config.label_names:
            require_labels(source, names[0])

    @property
    def label_side(self) -> int | None:
        """Side of the masks of labels: that of the teacher's masks. None in a run without terms of labels."""
        return self.teacher_info.levels[0] if self.config.label_names else None

    def task(self, proven: bool = True) -> DetectionTask:
        """Return the task on all training images, with validation on questions about held-out images.

        Args:
            proven: As in ``signals``.
        """
        book = self.asked
        leave_out([*book.dropped, *book.unasked], seen_by_all=True)
        maps, held_out = self.signals(proven), self._held_out()
        questions = partial(self._questions, book)
        side = self.label_side or 0
        return DetectionTask(self.config, self.teacher, self.kind, maps, self.words, questions, held_out, side)

    def _questions(self, book: PhraseBook, epoch: int) -> QuestionDataset:
        """Return the questions of an epoch.

        Every epoch has another view. Epochs that read a cache use its views in turn.
        """
        cached = not self.config.online and self.config.map_term(epoch) is not None
        views = self.config.data.views if cached else self.config.train.total_epochs
        labelled = not self.config.wanted(epoch).isdisjoint(self.config.label_names)
        return QuestionDataset(
            book, self.transform, self.config.data.seed, epoch, views, self.trained_keys, self.label_side, labelled
        )

    def _held_out(self) -> QuestionDataset | None:
        """Return questions about held-out images. None if a file of phrases describes training images only."""
        try:
            book = self._book(self.held_out_source())
            return QuestionDataset(book, self.transform, self.config.data.seed, label_side=self.label_side)
        except UserError:
            if self.config.questions.source != "jsonl":
                raise
            return None
