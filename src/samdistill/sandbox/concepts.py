"""The sandbox's words: which phrases exist, which apply to a scene, and a tokenizer that reads them."""

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
"""The phrase that every annotated object answers to."""
PHRASES: tuple[str, ...] = (*SHAPES, *COLOURS, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))
"""Nouns, adjectives and their pairs. Sizes stay out: near their limits two equal-looking objects differ in name."""
CONTEXT = 6
"""Tokens a phrase may have: the longest have two words and two marks."""
_SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
VOCABULARY: tuple[str, ...] = (*_SPECIAL, GENERIC, VISUAL, "thing", "small", "medium", "large", *COLOURS, *SHAPES)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, begin and end marks around them, lower case; unknown words become ``<unk>``."""
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
    """The tokenizer as models ask it."""
    return Words(build_tokenizer(), CONTEXT)


def phrases_of(names: Sequence[str]) -> tuple[str, ...]:
    """Of an object's names (see ``Scenes.concepts``) those that are phrases."""
    return tuple(name for name in names if name in _KNOWN)


_KNOWN = frozenset(PHRASES)


def absent_phrase(present: Sequence[tuple[str, ...]], rng: np.random.Generator) -> str:
    """A phrase that applies to none of a scene's objects; half of the time one that nearly does.

    present: the phrases of each object, its shape and its colour first. Near misses share a shape or a colour with
    something in the scene, so that a detector has to read both words.
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
