"""The phrases of ``--vocabulary``, checked against a model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.words import Words
from ..io import as_path
from ..reading import foreign
from ..types import VISUAL, UserError

NO_WORDS = '--web: the page of a detector has no text encoder; give its words, such as --vocabulary "red car,dog"'


def phrases_of(given: str | Path | Sequence[str], words: Words) -> tuple[str, ...]:
    """Return the phrases of a vocabulary.

    Args:
        given: A list, text with commas between the phrases, or a file with a phrase per line.
        words: Tokenizer of the model.

    Raises:
        UserError: There is no phrase, or one is empty, too long, the same to the tokenizer as another, or has a word
            that the model does not know.

    Example:
        >>> import samdistill as sd
        >>> phrases_of("red circle, star", sd.load("sandbox-student").network.words)
        ('red circle', 'star')
    """
    phrases = tuple(" ".join(phrase.split()) for phrase in _read(given))
    if not phrases:
        raise UserError("--vocabulary: no phrase given; give phrases with commas between them, or a file of lines")
    read: dict[tuple[int, ...], str] = {}
    for number, phrase in enumerate(phrases):
        if not phrase:
            raise UserError(f"--vocabulary: phrase {number + 1} is empty")
        if phrase in phrases[:number]:
            raise UserError(f"--vocabulary: {phrase!r} is given twice")
        if phrase == VISUAL:
            raise UserError(f"--vocabulary: {phrase!r} stands for example boxes without words; leave it out")
        if not words.fits(phrase):
            raise UserError(
                f"--vocabulary: {phrase[:80]!r} is longer than the {words.context} tokens this model reads; shorten it"
            )
        if unknown := words.unknown(phrase):
            raise UserError(f"--vocabulary: the model does not know the word {unknown[0]!r} of {phrase!r}")
        tokens = tuple(words.encode([phrase])[0][0].tolist())
        if (before := read.setdefault(tokens, phrase)) != phrase:
            raise UserError(f"--vocabulary: {phrase!r} is the same to this model as {before!r}; give one of them")
    return phrases


def _read(given: str | Path | Sequence[str]) -> list[str]:
    if not isinstance(given, str | Path):
        return list(given)
    if not str(given).strip():
        return []
    path = as_path(given)
    if isinstance(given, Path) or (len(str(given)) < 4096 and path.is_file()):
        with foreign(path, "not a readable vocabulary"):
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".txt":  # no phrase ends so
        raise UserError(f"--vocabulary: {path}: no such file")
    return str(given).split(",")
