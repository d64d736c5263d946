"""Phrases to train and evaluate a text encoder on: files of phrases, names of categories, captions."""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..reading import Table, foreign, parse_json, read_json
from ..types import UserError
from .federated import spoken
from .skipped import BadInput

_ARTICLES = ("a", "an", "the")
_APART = re.compile(r"[\W_]+")
_FIELDS = ("phrase", "phrases", "caption")
SPACY_MODEL = "en_core_web_sm"
_TRIES = 8
"""Phrases that are composed for each that is wanted, before ``compose`` gives up."""
_CAPTIONS = f"pip install 'samdistill[captions]', then python -m spacy download {SPACY_MODEL}; or give phrases"


def plain(phrase: str) -> str:
    """Replace every run of whitespace by one space."""
    return " ".join(phrase.split())


def normalised(phrase: str) -> str:
    """Return the form in which phrases of training and of evaluation sets are compared.

    Upper and lower case, compatible Unicode characters, punctuation, underscores, hyphens, whitespace and a leading
    article make no difference.

    Example:
        >>> normalised("The  Traffic-light ")
        'traffic light'
    """
    words = _APART.sub(" ", unicodedata.normalize("NFKC", phrase).casefold()).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in _ARTICLES else words)


def read_phrases(path: Path) -> list[str]:
    """Read the phrases of a file, with repeats, in its order.

    Args:
        path: A ``.txt`` file with a phrase per line; a ``.jsonl`` file whose lines are texts or objects with
            ``phrase``, ``phrases`` or ``caption``; or a ``.json`` file: a list of texts, an SA-Co file (its noun
            phrases), COCO captions, or COCO or LVIS annotations (the names of the categories and their synonyms).

    Raises:
        UserError: The file cannot be read, has none of these forms or no phrase, or it has captions and spaCy or its
            model is not installed.
    """
    readers: Mapping[str, Callable[[Path], list[str]]] = {".txt": _lines, ".jsonl": _objects, ".json": _annotations}
    if path.suffix not in readers:
        raise UserError(f"{path}: not a file of phrases; give one of {', '.join(readers)}")
    found = [phrase for phrase in map(plain, readers[path.suffix](path)) if phrase]
    if not found:
        raise UserError(f"{path}: holds no phrase")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _objects(path: Path) -> list[str]:
    """Read the phrases of JSON lines."""
    found, captions = list[str](), list[str]()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line, str | Table)  # type: ignore[arg-type]
            given = {"phrase": entry} if isinstance(entry, str) else entry
            name = next((name for name in _FIELDS if name in given), None)
            values = given[name] if name == "phrases" else [given.get(name or "")]
            if name is None or not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise ValueError('a line is a text, {"phrase": ..}, {"phrases": [..]} or {"caption": ..}')
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        (captions if name == "caption" else found).extend(values)
    return [*found, *noun_phrases(captions, path)]


def _annotations(path: Path) -> list[str]:
    """Read the phrases of a list, or of annotations in the COCO layout."""
    record = read_json(path, list[Any] | Table, "not a readable JSON file")  # type: ignore[arg-type]
    if isinstance(record, list):
        return _texts(record, path, "list")
    images, annotations, categories = (_entries(record, name, path) for name in ("images", "annotations", "categories"))
    if any("text_input" in image for image in images):
        return _texts([image.get("text_input") for image in images], path, "images")
    if any("caption" in annotation for annotation in annotations):
        return noun_phrases(_texts([one.get("caption") for one in annotations], path, "annotations"), path)
    names = _texts([category.get("name") for category in categories], path, "categories")
    synonyms = [name for category in categories for name in category.get("synonyms") or ()]
    return [spoken(name) for name in dict.fromkeys([*names, *_texts(synonyms, path, "synonyms")])]


def _entries(record: Table, name: str, path: Path) -> list[Table]:
    entries = record.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: {name!r} is not a list of objects")
    return entries


def _texts(values: Sequence[Any], path: Path, where: str) -> list[str]:
    """Return ``values``, all of which have to be texts."""
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(f"{path}: {where} entry {number} has no text")
    return list(values)


def noun_phrases(captions: Sequence[str], where: Path) -> list[str]:
    """Return the noun phrases of captions, without articles and pronouns.

    Raises:
        UserError: There are captions, and spaCy or its English model is not installed.
    """
    if not captions:
        return []
    language, found = _language(where), list[str]()
    with foreign(where, "spaCy cannot read its captions"):
        for document in language.pipe(captions):
            for chunk in document.noun_chunks:
                words = [token.text for token in chunk if token.pos_ not in ("DET", "PRON")]
                found.append(" ".join(words))
    return found


@cache
def _english() -> Any:
    """Load spaCy's English model, once for all files."""
    import spacy

    return spacy.load(SPACY_MODEL, disable=["ner"])


def _language(where: Path) -> Any:
    try:
        return _english()
    except (ImportError, OSError) as error:
        raise UserError(f"{where}: has captions, and spaCy or its model is missing; {_CAPTIONS}") from error


@dataclass(frozen=True)
class PhraseList:
    """Phrases of a run, divided into those that are trained and those that are not.

    Attributes:
        train: Phrases to train on, each once, in the order of the sources.
        held_out: Phrases to evaluate on: a share of the sources, and the phrases of the evaluation sets.
        excluded: Number of phrases of the sources that are not trained on because an evaluation set has them.
        repeated: Number of repetitions in the sources.
        dropped: Phrases that a model cannot read.
        word_counts: Number of training phrases with a word, by normalised word.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    excluded: int
    repeated: int
    dropped: tuple[BadInput, ...]
    word_counts: Mapping[str, int]

    @classmethod
    def divide(
        cls, phrases: Sequence[str], evaluated: Iterable[str], fraction: float, seed: int,
        problem: Callable[[str], str | None],
    ) -> PhraseList:  # fmt: skip
        """Divide phrases.

        Phrases with the same ``normalised`` text are one phrase, in the form that occurs first in the sources. A phrase
        of an evaluation set is never trained on. Of the others, those with the smallest hashes are held out.

        Args:
            phrases: All phrases of the sources.
            evaluated: Phrases of the evaluation sets.
            fraction: Share of the sources to hold out, 0..1.
            seed: Seed of the hash.
            problem: Returns why a phrase cannot be read, or None.

        Raises:
            UserError: No phrase is left to train on.
        """
        once, kept_out = _once(phrases), _once(evaluated)
        everything = kept_out | once
        reasons = {phrase: problem(phrase) for phrase in everything.values()}
        dropped = tuple(BadInput(repr(phrase), why) for phrase, why in reasons.items() if why is not None)
        usable = {key: phrase for key, phrase in once.items() if reasons[phrase] is None}
        free = [key for key in usable if key not in kept_out]
        chosen = set(sorted(free, key=lambda key: _hash(key, seed))[: round(fraction * len(free))])
        train = tuple(usable[key] for key in free if key not in chosen)
        if not train:
            first = f"; {dropped[0].key} is {dropped[0].reason}" if dropped else ""
            raise UserError(
                f"no phrase is left to train on: of {len(once)}, {len(usable) - len(free)} are in the evaluation sets, "
                f"{len(chosen)} are held out and {len(dropped)} cannot be read{first}"
            )
        others = (everything[key] for key in kept_out if reasons[everything[key]] is None)
        counts = Counter(word for phrase in train for word in set(normalised(phrase).split()))
        return cls(
            train, (*(usable[key] for key in free if key in chosen), *others), len(usable) - len(free),
            len(phrases) - len(once), dropped, counts,
        )  # fmt: skip

    def rarity(self, phrase: str) -> int:
        """Return the number of training phrases with the phrase's rarest word."""
        return min((self.word_counts.get(word, 0) for word in normalised(phrase).split()), default=0)


def _once(phrases: Iterable[str]) -> dict[str, str]:
    """Return the first form of each phrase by its normalised text."""
    found: dict[str, str] = {}
    for phrase in phrases:
        found.setdefault(normalised(phrase) or phrase, phrase)
    return found


def _hash(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()


def compose(
    words: Sequence[str], count: int, seed: int, refused: Callable[[str], bool], longest: int = 4
) -> tuple[str, ...]:
    """Compose phrases of one to ``longest`` words. A teacher can be asked for the features of any text.

    The words are dealt from a shuffled deck that begins again when it is used up, so all occur equally often.

    Args:
        words: The deck, each word once.
        count: Number of phrases. There are fewer if too many of those that are composed are repeated or refused.
        seed: Seed of lengths and decks.
        refused: Returns whether a phrase must not be used.
        longest: Largest number of words.

    Example:
        >>> compose(["red", "car"], 2, 0, lambda phrase: phrase == "red", longest=1)
        ('car',)
    """
    rng, dealt, found = random.Random(f"composed/{seed}"), _decks(words, seed), dict[str, str]()
    for _ in range(count * _TRIES if words else 0):
        if len(found) == count:
            break
        phrase = " ".join(next(dealt) for _ in range(rng.randint(1, longest)))
        if not refused(phrase):
            found.setdefault(normalised(phrase) or phrase, phrase)
    return tuple(found.values())


def _decks(words: Sequence[str], seed: int) -> Iterator[str]:
    """Yield ``words`` without end, in a new order each time."""
    rng = random.Random(f"deck/{seed}")
    while True:
        yield from rng.sample(words, len(words))


PhraseItem = tuple[int, str]
"""Number of a phrase among those that are trained on, and the phrase."""


class PhraseDataset(Dataset[PhraseItem]):
    """Phrases in an order that may repeat some and leave others out.

    Args:
        phrases: The phrases.
        order: Numbers of phrases, in the order of the items. None for each phrase once.
    """

    def __init__(self, phrases: Sequence[str], order: Sequence[int] | None = None) -> None:
        self.phrases, self.order = phrases, range(len(phrases)) if order is None else order

    @property
    def identity(self) -> Sequence[str]:
        """Strings that distinguish these items from those of other data: the phrases."""
        return self.phrases

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> PhraseItem:
        number = self.order[index]
        return number, self.phrases[number]
