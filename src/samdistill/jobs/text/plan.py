"""Plan of a text run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...data.skipped import leave_out
from ...engine.frozen_norm import batch_norms
from ...report import human_bytes
from ...store import record_bytes
from ...students import TextStudent
from ..base import Plan, optimiser_bytes, teacher_bytes
from ..caching import planned
from .config import TextRunConfig
from .parts import TextParts
from .task import text_config


@dataclass(frozen=True, kw_only=True)
class TextPlan(Plan):
    """Plan of a text run. Sizes are in bytes.

    Attributes:
        teacher_params: Parameters of the teacher's text encoder and projection.
        student_params: The same of the student.
        context: Tokens of a phrase that the student reads.
        phrases: Phrases to train on.
        held_out: Phrases to evaluate on.
        excluded: Phrases of the sources that are left out because an evaluation set has them.
        repeated: Repetitions in the sources.
        trained_questions: Phrases of ``evaluate.concepts`` that are trained on.
        composed: Phrases to train on that are composed of words.
        untaught: Evaluated phrases with a token that no trained phrase has.
        online: The teacher runs during training, without a cache.
    """

    teacher: str
    teacher_params: int
    width: int
    student: str
    student_params: int
    context: int
    phrases: int
    held_out: int
    excluded: int
    repeated: int
    dropped: int
    trained_questions: int
    composed: int
    untaught: tuple[str, ...]
    online: bool
    codec: str
    bytes_per_record: int
    raw_bytes_per_record: int
    cache_bytes: int
    weights_and_optimiser_bytes: int
    teacher_bytes: int

    @property
    def inputs(self) -> int:
        return self.phrases

    @property
    def trained_on(self) -> str:
        return f"{self.phrases} phrases"

    @property
    def headline(self) -> str:
        return (
            f"{self.student}: {self.student_params / 1e6:.2f}M parameters for {self.teacher_params / 1e6:.2f}M; "
            f"{self.phrases} phrases, {human_bytes(self.cache_bytes)} of cache, {self.steps} steps"
        )

    @property
    def raw_record_bytes(self) -> int:
        return self.raw_bytes_per_record

    def facts(self) -> dict[str, str]:
        count = self.trained_questions
        leaked = f"; {count} phrase(s) of evaluate.concepts are trained on" if count else ""
        found = {
            "teacher": f"{self.teacher} ({self.teacher_params / 1e6:.2f}M in its text encoder and projection)",
            "student": f"{self.student} ({self.student_params / 1e6:.3f}M), {self.context} tokens to {self.width} "
            "channels",
            "phrases": f"{self.phrases} to train on and {self.composed} composed ones, {self.held_out} to evaluate on, "
            f"{self.repeated} repetition(s)",
            "excluded": f"{self.excluded} phrase(s) of the evaluation sets; {self.dropped} that a model cannot read"
            + leaked,
            "cache": planned(
                self.online, self.cache_bytes, f"{self.codec}, {human_bytes(self.bytes_per_record)} a phrase"
            ),
            "memory": f"{human_bytes(self.weights_and_optimiser_bytes)} weights and optimiser"
            + (f", {human_bytes(self.teacher_bytes)} teacher" if self.online else "")
            + "; activations are not counted",
            "steps": f"{self.steps} ({self.steps_per_epoch} an epoch)",
        }
        return found | ({"words": untaught_line(self.untaught)} if self.untaught else {})


def untaught_line(phrases: Sequence[str]) -> str:
    """Return the line about evaluated phrases with a token that no trained phrase has."""
    return (
        f"{len(phrases)} evaluated phrase(s) have a word that no trained phrase has, such as {phrases[0]!r}: its "
        "embedding stays random; raise data.composed"
    )


def plan_text(config: TextRunConfig) -> TextPlan:
    """Return the plan of a text run. Phrases and the tokenizer are read, weights are not."""
    parts, train = TextParts(config), config.train
    info, book = parts.teacher_info, parts.book
    leave_out(book.dropped, seen_by_all=True)
    sizes = text_config(config.student, info)
    with torch.device("meta"):
        student = TextStudent(sizes)
    params = sum(p.numel() for p in student.parameters())
    shape, per_epoch = parts.specs("")[""].shape, parts.items // train.batch_size
    per_record, records = record_bytes(config.cache.codec, shape), len(parts.trained) + len(parts.others)
    name = config.student.size if isinstance(config.student.size, str) else "own size"
    return TextPlan(
        teacher=config.teacher.path, teacher_params=info.params, width=info.width, student=f"text encoder {name}",
        student_params=params, context=sizes.max_position_embeddings, phrases=len(parts.phrases),
        held_out=len(parts.others), excluded=book.excluded, repeated=book.repeated, dropped=len(book.dropped),
        trained_questions=parts.trained_questions(), composed=len(parts.composed), untaught=parts.untaught(),
        online=config.online, codec=config.cache.codec, bytes_per_record=per_record,
        raw_bytes_per_record=record_bytes("fp16", shape), cache_bytes=0 if config.online else per_record * records,
        weights_and_optimiser_bytes=optimiser_bytes(student, train),
        teacher_bytes=teacher_bytes(config.teacher, info.params) if config.online else 0,
        batch_norms=batch_norms(student), steps_per_epoch=per_epoch, steps=per_epoch * train.total_epochs,
    )  # fmt: skip
