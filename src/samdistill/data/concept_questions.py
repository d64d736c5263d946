"""Held-out questions with their answers, from the names and masks of a labelled data set."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..config import QuestionsConfig
from ..types import UserError
from .questions import PhraseBook
from .saco import ConceptPair, ConceptSet, to_rle
from .skipped import BadInput
from .sources import BadImage, Source, evenly


def concepts_of(source: Source, images: int | None = None, seed: int = 0) -> ConceptSet | None:
    """A question for every name of an image, and as many for names that it does not have.

    Args:
        source: Images with masks and names, such as COCO. An image is taken to show every object of its names.
        images: At most so many, spread over the keys.
        seed: Of the draw of absent names, which depends on nothing else but the image's key.

    Returns:
        Questions in the order of the keys; None where the data have no masks or no names. A name that only a crowd has
        is not asked. Images that cannot be used are among the problems.

    Raises:
        UserError: No image can be asked about.
    """
    if not source.labelled or not source.vocabulary:
        return None
    book = PhraseBook(QuestionsConfig(source="names"), source)
    pairs, problems = list[ConceptPair](), list(source.problems)
    for key in evenly(book.keys, images):
        try:
            pairs += _pairs(book, key, seed, len(pairs) + 1)
        except BadImage as error:
            problems.append(error.bad)
    return _as_set(source, pairs, problems)


def _pairs(book: PhraseBook, key: str, seed: int, first: int) -> list[ConceptPair]:
    objects, (height, width) = book.source.instances(key), book.source.check(key)
    found = list[tuple[str, list, list]]()
    for text in book.phrases(key):
        own = [one for one in objects if text in one.names]
        masks = [[to_rle(one.mask) for one in own if one.crowd is crowd] for crowd in (False, True)]
        if masks[0]:
            found.append((text, *masks))
    rng = random.Random(f"held-out questions/{seed}/{key}")
    absent = dict.fromkeys(book.absent(key, rng) for _ in book.phrases(key))
    found += [(text, [], []) for text in absent if text is not None]
    return [
        ConceptPair(first + n, key, text, height, width, tuple(rles), (None,) * len(rles), tuple(groups))
        for n, (text, rles, groups) in enumerate(found)
    ]


def _as_set(source: Source, pairs: Sequence[ConceptPair], problems: Sequence[BadInput]) -> ConceptSet:
    if not pairs:
        first = f"; the first: {problems[0].key}: {problems[0].reason}" if problems else ""
        raise UserError(f"no held-out image can be asked about, {len(problems)} inputs left out{first}")
    paths = {pair.file_name: source.path(pair.file_name) for pair in pairs}
    return ConceptSet(tuple(pairs), tuple(problems), frozenset(pair.id for pair in pairs), paths)
