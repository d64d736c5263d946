"""Configuration of the text job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from ...config.losses import loss_block
from ...config.parts import (
    CacheConfig,
    CachedRun,
    Fraction,
    Positive,
    Seed,
    Strict,
    TeacherConfig,
    TrainConfig,
)
from .losses import TEXT_TERMS

SANDBOX_PHRASES = "sandbox"
"""Entry of ``data.phrases`` for the phrases of the sandbox."""
Sources = tuple[Annotated[str, Field(min_length=1)], ...]


class EncoderSize(Strict):
    """Size of a text encoder in numbers."""

    hidden: Positive
    layers: Annotated[int, Field(ge=2, le=1000)]
    heads: Positive
    ffn: Positive
    repmixer: bool = True
    """The first and the last layer are convolutions over the tokens, as in MobileCLIP-S0."""

    @model_validator(mode="after")
    def _heads_divide(self) -> EncoderSize:
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not a multiple of heads={self.heads}")
        return self

    def fields(self) -> dict[str, Any]:
        """Return the fields of transformers' ``Sam3LiteTextTextConfig``."""
        return {
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "intermediate_size": self.ffn, "use_repmixer_blocks": self.repmixer,
        }  # fmt: skip


def _form(value: Any) -> str:
    """Return which form of ``student.size`` is meant, so that an error is about this form alone."""
    return "name" if isinstance(value, str) else "numbers"


Size = Annotated[
    Annotated[Literal["s0", "s1", "b", "l"], Tag("name")] | Annotated[EncoderSize, Tag("numbers")], Discriminator(_form)
]


class TextEncoderConfig(Strict):
    """The small text encoder. Its vocabulary and its width after the projection are the teacher's."""

    size: Size = "s0"
    """MobileCLIP's S0, S1, B or L, or numbers."""
    context: Positive = 32
    """Largest number of tokens of a phrase, with start and end tokens. Longer phrases are left out."""
    attend_padding: bool = False
    """Tokens attend to padding, as EfficientSAM3's code does and transformers' class does not. Its file names need it.
    """
    start: Path | None = None
    """Finished run of this job with the same student, its ``student/``, or a file of EfficientSAM3. All weights start
    from it.
    """


class PhrasesConfig(Strict):
    """The phrases, and their division into those that are trained on and those that are evaluated."""

    phrases: Annotated[Sources, Field(min_length=1)]
    """Files of phrases, of annotations or of captions, or ``sandbox``."""
    exclude: Sources = ()
    """Evaluation sets, in the same forms. Their phrases are never trained on, whatever their case and punctuation."""
    held_out_fraction: Fraction = 0.1
    """Share of the other phrases that is evaluated and not trained on, chosen by a hash."""
    composed: Annotated[int, Field(ge=0)] = 0
    """Number of additional phrases, each once in an epoch: one to four words of ``phrases`` and of the tokenizer, in
    any order. A word that occurs in no phrase otherwise keeps its random initial embedding.
    """
    passes: Positive = 1
    """Number of items per phrase of ``phrases`` in an epoch. More than one makes sense for a small vocabulary."""
    hard: Fraction = 0.0
    """Share of an epoch's items that is drawn in proportion to the phrases' cosine loss, from the second epoch on."""
    seed: Seed = 0
    workers: Annotated[int, Field(ge=0, le=1024)] = 2

    @property
    def root(self) -> str:
        """The sources, for messages."""
        return ", ".join(self.phrases)


TextLossConfig = loss_block("TextLossConfig", "Weights of the terms of text distillation.", (TEXT_TERMS,))


class TokenCacheConfig(CacheConfig):
    """Cache of the teacher's tokens, one record per phrase."""

    batch_size: Positive = 64


class TextEvaluateConfig(Strict):
    """Evaluation on phrases that were not trained on."""

    phrases: Positive | None = 2000
    """Largest number of phrases. None for all."""
    concepts: Path | None = None
    """Questions with masks, a file in the SA-Co format, for cgF1 with the teacher's vision encoder and heads."""
    threshold: Fraction = 0.5
    images: Positive | None = None
    """Largest number of images of ``concepts``. None for all."""
    batch_size: Positive = 4
    """Images of ``concepts`` in one forward pass."""


class TextRunConfig(CachedRun):
    """Configuration of a text run. The resolved configuration is saved in the run folder."""

    job: Literal["text"] = "text"
    output: Path = Path("runs/text")
    teacher: TeacherConfig
    student: TextEncoderConfig = TextEncoderConfig()
    data: PhrasesConfig  # type: ignore[assignment]
    cache: TokenCacheConfig = TokenCacheConfig()
    loss: TextLossConfig = TextLossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: TextEvaluateConfig = TextEvaluateConfig()
