"""Text distillation: a small text encoder learns the projected tokens of SAM 3's text encoder.

It is published as the text part of stage 1 of EfficientSAM3, and as SAM3-LiteText.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...checkpoints.text import start_text
from ...checkpoints.words import Words
from ...data.phrases import PhraseDataset, PhraseItem
from ...engine.held_out import held_out_terms
from ...engine.task import Phase, Task
from ...students import TextStudent, TextStudentConfig, text_student_config
from ...teachers import Maps, TextInfo, TextSignals
from ...types import Term, Terms
from .config import TextEncoderConfig, TextRunConfig
from .losses import TEXT_TERMS, phrase_means, token_cosine
from .sampling import PhraseSampler

VALIDATION_BATCH = 64
"""Held-out phrases in one forward pass after an epoch."""


@dataclass(frozen=True)
class PhraseBatch:
    """Phrases, and the teacher's tokens of them.

    Attributes:
        numbers: Numbers of the phrases among those that are trained on.
        texts: The phrases.
        ids: Token ids.
        mask: 1 for tokens, 0 for padding.
        teacher_features: What a loader worker read from the signals; after ``to``, the teacher's map (p, c, 1, t).
    """

    numbers: Int[Tensor, " p"]
    texts: tuple[str, ...]
    ids: Int[Tensor, "p t"]
    mask: Int[Tensor, "p t"]
    teacher_features: Maps

    @property
    def target(self) -> Float[Tensor, "p t c"]:
        """The teacher's tokens. Its context may be longer than the student's, which has all tokens of every phrase."""
        return self.teacher_features[0][:, :, 0, : self.mask.shape[1]].transpose(1, 2)


def text_config(student: TextEncoderConfig, teacher: TextInfo) -> TextStudentConfig:
    """Return the configuration of a student with the teacher's width and vocabulary."""
    size = student.size if isinstance(student.size, str) else student.size.fields()
    return text_student_config(
        size, context=min(student.context, teacher.context), vocab_size=teacher.vocab_size, width=teacher.width,
        attend_padding=student.attend_padding,
    )  # fmt: skip


def build_student(config: TextEncoderConfig, teacher: TextInfo) -> TextStudent:
    """Build a student with random weights, or those of ``config.start``."""
    student = TextStudent(text_config(config, teacher))
    if config.start is not None:
        start_text(student, config.start)
    return student


class TextTask(Task[PhraseBatch]):
    """Masked MSE and cosine between the tokens of two text encoders."""

    def __init__(
        self, config: TextRunConfig, teacher: TextInfo, signals: TextSignals, words: Words, phrases: Sequence[str],
        held_out: TextSignals | None = None, others: Sequence[str] = (), composed: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Set up the task.

        Args:
            config: Configuration of the run.
            teacher: Sizes of the teacher's text encoder.
            signals: The teacher's tokens, running or cached.
            words: The student's tokenizer.
            phrases: Phrases to train on, ``data.passes`` times in an epoch.
            held_out: The teacher's tokens of ``others``.
            others: Phrases whose terms are logged after every epoch.
            composed: Further phrases to train on, once in an epoch.
        """
        self.config, self.teacher, self.signals, self.words = config, teacher, signals, words
        self.phrases, self.held_out, self.others = (*phrases, *composed), held_out, others
        self.taught_by = signals.fingerprint
        data = config.data
        self.sampler = PhraseSampler(len(phrases), data.passes, data.hard, config.train.seed, len(composed))

    def build_student(self) -> TextStudent:
        return build_student(self.config.student, self.teacher)

    def dataset(self, epoch: int) -> PhraseDataset:
        return PhraseDataset(self.phrases, self.sampler.order(epoch))

    def state(self) -> dict[str, Tensor]:
        return self.sampler.state()

    def load_state(self, states: Sequence[Mapping[str, Tensor]], rank: int, world: int) -> None:
        self.sampler.load_state(states, rank, world)

    def collate(self, items: Sequence[PhraseItem], phase: Phase = Phase()) -> PhraseBatch:
        texts = tuple(text for _, text in items)
        ids, mask = self.words.encode(texts)
        return PhraseBatch(torch.tensor([number for number, _ in items]), texts, ids, mask, self.signals.read(texts))

    def to(self, batch: PhraseBatch, device: torch.device) -> PhraseBatch:
        self.signals.to(device)
        numbers, ids, mask = (part.to(device, non_blocking=True) for part in (batch.numbers, batch.ids, batch.mask))
        found = self.signals.answer(batch.texts, batch.teacher_features)
        return PhraseBatch(numbers, batch.texts, ids, mask, found)

    def counts(self, batch: PhraseBatch) -> dict[str, int]:
        """Return the number of phrases."""
        return dict.fromkeys(self.config.loss.named, len(batch.texts))

    def terms(self, student: nn.Module, batch: PhraseBatch, phase: Phase = Phase()) -> Terms:
        tokens = student(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        loss, target = self.config.loss, batch.target
        with torch.autocast(tokens.device.type, enabled=False):  # losses are float32 in any precision
            values = {name: TEXT_TERMS.get(name)(tokens.float(), target, batch.mask) for name in loss.named}
            if torch.is_grad_enabled():  # not after an epoch, on held-out phrases
                errors = 1 - token_cosine(tokens.detach(), target)
                self.sampler.record(batch.numbers, phrase_means(errors, batch.mask))
        return Terms({name: Term(value, loss.weight(name)) for name, value in values.items()})

    @torch.no_grad()
    def validate(self, student: nn.Module, phase: Phase = Phase()) -> dict[str, float]:
        """Return the trained terms and their weighted total on held-out phrases."""
        if self.held_out is None or not self.others:
            return {}
        task = TextTask(self.config, self.teacher, self.held_out, self.words, self.others)
        wanted = phase.wanted(self.config.loss.named)
        return held_out_terms(task, PhraseDataset(self.others), VALIDATION_BATCH, student, wanted, phase)
