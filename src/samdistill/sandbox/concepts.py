"""Phrases of the sandbox: the vocabulary, the phrases that apply to an object, and a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ..checkpoints.words import Words
from ..types import VISUAL
from .scenes import COLOURS, SHAPES

GENERIC = "object"
"""The phrase that applies to every annotated object."""
PHRASES: tuple[str, ...] = (*SHAPES, *COLOURS, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))
"""Shapes, colours and their pairs. Sizes are not included: objects close to a limit look alike and differ in name."""
CONTEXT = 6
"""Context length of the tokenizer. The longest phrases take four tokens: two words, begin and end."""
_SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
VOCABULARY: tuple[str, ...] = (*_SPECIAL, GENERIC, VISUAL, "thing", "small", "medium", "large", *COLOURS, *SHAPES)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per lower-case word, between ``<bos>`` and ``<eos>``.

    Words outside ``VOCABULARY`` become ``<unk>``.
    """
    words = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", words["<bos>"]), ("<eos>", words["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=CONTEXT, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>",
        eos_token="<eos>",
    )  # fmt: skip


def sandbox_words() -> Words:
    """Return the tokenizer in the form that models take."""
    return Words(build_tokenizer(), CONTEXT)


def phrases_of(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of an object (see ``Scenes.concepts``) that are in ``PHRASES``."""
    return tuple(name for name in names if name in _KNOWN)


_KNOWN = frozenset(PHRASES)


def absent_phrase(present: Sequence[tuple[str, ...]], rng: np.random.Generator) -> str:
    """Draw a phrase that applies to none of a scene's objects.

    With probability 0.5 the phrase is a colour and a shape that are each taken from the scene with probability 0.5, so
    that a detector has to read both words.

    Args:
        present: Phrases of each object; the first is its shape and the second its colour.
        rng: Random stream.
    """
    there = {phrase for names in present for phrase in names}
    shapes, colours = [names[0] for names in present], [names[1] for names in present]
    for _ in range(64):
        if present and rng.random() < 0.5:
            shape = str(rng.choice(shapes)) if rng.random() < 0.5 else str(rng.choice(SHAPES))
            colour = str(rng.choice(colours)) if rng.random() < 0.5 else str(rng.choice(list(COLOURS)))
            phrase = f"{colour} {shape}"
        else:
            kind = rng.integers(3)
            pool = (SHAPES, tuple(COLOURS), PHRASES[len(SHAPES) + len(COLOURS) :])[kind]
            phrase = str(rng.choice(pool))
        if phrase not in there:
            return phrase
    return next(phrase for phrase in PHRASES if phrase not in there)
