"""Parts of a text run: phrases, tokenizers, teacher, and store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ...checkpoints.words import Words
from ...data.phrases import PhraseList, compose, normalised, read_phrases
from ...data.skipped import leave_out
from ...data.sources import evenly
from ...dist import process_rank
from ...io import as_path
from ...sandbox.concepts import PHRASES
from ...store import StoreSpec
from ...teachers import RunningMaps, Sam3Text, StoredMaps, TextInfo, TextSignals, describe_text, phrase_records
from ...teachers.sam3_text import text_words
from ...types import VISUAL
from ..caching import Specs, is_cached, open_stores, prove, refuse_missing
from .config import SANDBOX_PHRASES, TextRunConfig
from .task import TextTask

TOKENS = "text_tokens"
"""Name of the teacher's tensor in a store."""


@dataclass(frozen=True)
class TextParts:
    """Parts of a text run. Each is built on first access.

    Attributes:
        config: Configuration of the run.
    """

    config: TextRunConfig

    @cached_property
    def teacher_info(self) -> TextInfo:
        return describe_text(self.config.teacher)

    @cached_property
    def teacher_words(self) -> Words:
        """The teacher's tokenizer."""
        return text_words(self.config.teacher, self.teacher_info)

    @cached_property
    def words(self) -> Words:
        """The student's tokenizer: the teacher's with the student's context."""
        words = self.teacher_words
        return Words(words.tokenizer, min(words.context, self.config.student.context))

    @cached_property
    def book(self) -> PhraseList:
        """The phrases, without those that a model cannot read."""
        data = self.config.data
        return PhraseList.divide(
            self._read(data.phrases), self._read(data.exclude), data.held_out_fraction, data.seed, self._problem
        )

    @cached_property
    def phrases(self) -> tuple[str, ...]:
        """The phrases that are trained on, and the one that stands for the phrase in questions with a box alone."""
        book, known = self.book, {normalised(phrase) for phrase in (*self.book.train, *self.book.held_out)}
        return book.train if VISUAL in known or self._problem(VISUAL) else (*book.train, VISUAL)

    @cached_property
    def composed(self) -> tuple[str, ...]:
        """Phrases composed of words. None is one that is evaluated on, in ``evaluate.concepts`` neither."""
        data = self.config.data
        if not data.composed:
            return ()
        known = {normalised(phrase) for phrase in (*self.phrases, *self.book.held_out, *self._questions())}
        words = sorted(
            {*self.words.whole_words(), *(word for word in self.book.word_counts if not self._problem(word))}
        )
        return compose(
            words, data.composed, data.seed, lambda phrase: normalised(phrase) in known or bool(self._problem(phrase))
        )

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """All phrases that are trained on."""
        return (*self.phrases, *self.composed)

    @property
    def items(self) -> int:
        """Number of items of an epoch."""
        return self.config.data.passes * len(self.phrases) + len(self.composed)

    def untaught(self) -> tuple[str, ...]:
        """Return the evaluated phrases with a token that no trained phrase has, so that its embedding is random."""
        asked = [phrase for phrase in dict.fromkeys((*self.others, *self._questions())) if not self._problem(phrase)]
        known = set[int]().union(*self.words.tokens(self.trained))
        return tuple(phrase for phrase, own in zip(asked, self.words.tokens(asked), strict=True) if not own <= known)

    def _questions(self) -> list[str]:
        """Return the phrases of ``evaluate.concepts``, with repeats."""
        concepts = self.config.evaluate.concepts
        return [] if concepts is None else read_phrases(concepts)

    def _problem(self, phrase: str) -> str | None:
        if unknown := self.words.unknown(phrase):
            return f"not in the vocabulary of the tokenizer: {', '.join(unknown)}"
        return self.words.problem(phrase, "a text encoder")

    def _read(self, sources: Sequence[str]) -> list[str]:
        found = list[str]()
        for source in sources:
            found += PHRASES if source == SANDBOX_PHRASES else read_phrases(as_path(source))
        return found

    def teacher(self) -> Sam3Text:
        """Load the teacher's text encoder on the CPU. It is not kept: training from a cache does not need it."""
        return Sam3Text(self.config.teacher)

    def running(self) -> RunningMaps[Sequence[str]]:
        """Return the signals of the running teacher."""
        teacher = self.teacher()
        return RunningMaps(teacher, teacher.features)

    def trained_questions(self) -> int:
        """Return the number of phrases of ``evaluate.concepts`` that are trained on."""
        asked = {normalised(phrase) for phrase in self._questions()}
        return len(asked & {normalised(phrase) for phrase in self.book.train})

    def specs(self, fingerprint: str) -> Specs:
        """Return the specification of the store, without reading weights.

        A record has the teacher's whole context, so students of any context share it.

        Args:
            fingerprint: Fingerprint of the teacher.
        """
        shape = (self.teacher_info.width, 1, self.teacher_words.context)
        return {"": StoreSpec(TOKENS, shape, 0, fingerprint, self.teacher_words.digest, self.config.cache.codec)}

    def checkable(self) -> TextParts:
        """Return these parts if there is a cache, else those of the same run with a running teacher."""
        cached = is_cached(self.config.store_root, self.specs(""))
        return self if cached else TextParts(self.config.run_online())

    def signals(self, proven: bool = True) -> TextSignals:
        """Return the running teacher or its cache.

        Args:
            proven: On rank 0, open the teacher and check that it is the one that was cached.

        Raises:
            UserError: A phrase is not cached, or the cache does not fit.
        """
        if self.config.online:
            return self.running()
        root, wanted = self.config.store_root, [*self.trained, *self.others]
        stores = open_stores(root, self.specs(""), "tokens")
        if proven and process_rank() == 0:
            prove(root, self.specs(self.teacher().fingerprint))
        refuse_missing(root, [phrase for phrase in wanted if phrase not in stores[""]], len(wanted))
        return StoredMaps(list(stores.values()), phrase_records)

    @cached_property
    def others(self) -> tuple[str, ...]:
        """The phrases that are evaluated, evenly spread over those that are not trained on."""
        return tuple(evenly(self.book.held_out, self.config.evaluate.phrases))

    def task(self, proven: bool = True) -> TextTask:
        """Return the task on all training phrases, with validation on the others.

        Args:
            proven: As in ``signals``.
        """
        leave_out(self.book.dropped, seen_by_all=True)
        signals = self.signals(proven)
        return TextTask(
            self.config, self.teacher_info, signals, self.words, self.phrases, signals, self.others, self.composed
        )
