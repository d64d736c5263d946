"""What is asked of the images: phrases from a list, a file or the labels, boxes of annotated objects."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from ..config import QuestionsConfig
from ..ops.boxes import xyxy_to_cxcywh
from ..reading import Table, parse_json
from ..types import VISUAL, ConceptPrompts, ImageBatch, UserError
from .loader import ImageDataset, ImageItem, collate_images
from .skipped import BadInput
from .sources import BadImage, Source
from .transforms import ViewTransform

_TRIES = 64
T = TypeVar("T")


def _plain(phrase: str) -> str:
    return " ".join(phrase.split())


def _read_line(line: str) -> tuple[str, list[str]]:
    """Key and phrases. Raises ``ValueError`` for anything else than the two documented forms."""
    entry = parse_json(line, Table)
    if sorted(entry) not in (["key", "phrases"], ["caption", "key"]):
        got = f"fields {sorted(entry)}"
        raise ValueError(f'{got}; a line is {{"key": .., "phrases": [..]}} or {{"key": .., "caption": ".."}}')
    phrases = entry["phrases"] if "phrases" in entry else [entry["caption"]]
    if not isinstance(entry["key"], str) or not isinstance(phrases, list):
        raise ValueError("'key' is a text and 'phrases' a list of texts")
    if not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
        raise ValueError("a phrase or caption is empty or no text")
    return entry["key"], [_plain(phrase) for phrase in phrases]


def _read_lines(path: Path) -> dict[str, list[str]]:
    """Phrases by key; several lines of one key add up, as COCO has several captions of one image."""
    found: dict[str, list[str]] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        key, phrases = _read_line(line)
                    except ValueError as error:
                        raise UserError(f"{path}:{number}: {error}") from None
                    found.setdefault(key, []).extend(phrases)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"questions.file: cannot read {path}: {error}") from None
    if not found:
        raise UserError(f"questions.file: {path} is empty; write one JSON object a line")
    return found


class PhraseBook:
    """What can be asked about each image of a source.

    keys: images about which something can be asked, sorted; those in ``unasked`` have no phrase. vocabulary: every
    phrase that can be asked. dropped: phrases that ``fits`` refuses (a text encoder's context is limited, and half a
    phrase asks for something else); they are never asked.
    """

    def __init__(self, config: QuestionsConfig, source: Source, fits: Callable[[str], bool] | None = None) -> None:
        """Raises ``UserError`` for a broken file, box questions without labels, and where nothing is left to ask."""
        if config.boxes > 0 and not source.labelled:
            raise UserError("questions.boxes: the data set has no annotated objects whose boxes could be shown; set 0")
        self.config, self.source = config, source
        asked = self._listed()
        words = set(source.vocabulary) if config.source == "names" else {p for own in asked.values() for p in own}
        unfit = {phrase for phrase in words if fits is not None and not fits(phrase)}
        why = "longer than a text encoder's context, so it is never asked"
        self.dropped = [BadInput(repr(phrase), why) for phrase in sorted(unfit)]
        self.vocabulary = tuple(sorted(words - unfit))
        if unfit:
            asked = {key: tuple(p for p in own if p not in unfit) for key, own in asked.items()}
        self._phrases = {key: own for key, own in asked.items() if own}
        self.keys = sorted(self._phrases)
        self.unasked = [BadInput(key, "nothing to ask about it") for key in source.keys if key not in self._phrases]
        if not self.keys:
            long = f"; {len(unfit)} phrases are too long, such as {min(unfit)!r}" if unfit else ""
            raise UserError(f"questions.source={config.source}: there is nothing to ask about any image{long}")

    def _listed(self) -> dict[str, tuple[str, ...]]:
        keys = self.source.keys
        if self.config.source == "generic":
            return dict.fromkeys(keys, tuple(dict.fromkeys(_plain(phrase) for phrase in self.config.generic)))
        if self.config.source == "names":
            return {key: tuple(self.source.phrases(key)) for key in keys}
        assert self.config.file is not None  # the config sees to it
        lines = _read_lines(self.config.file)
        found = {key: tuple(dict.fromkeys(lines[key])) for key in keys if key in lines}
        if not found:
            raise UserError(f"{self.config.file}: none of its {len(lines)} keys is in the data set; "
                            f"keys look like {keys[0]!r}, not {min(lines)!r}")  # fmt: skip
        return found

    def phrases(self, key: str) -> tuple[str, ...]:
        """What can be asked of an image and is, as far as is known, in it."""
        return self._phrases[key]

    def absent(self, key: str, rng: random.Random) -> str | None:
        """A phrase of other images, drawn evenly; None where the image has them all. Upper case makes no difference."""
        own = {phrase.casefold() for phrase in self._phrases[key]}
        for _ in range(16):
            phrase = self.vocabulary[int(rng.random() * len(self.vocabulary))]
            if phrase.casefold() not in own:
                return phrase
        others = [phrase for phrase in self.vocabulary if phrase.casefold() not in own]
        return others[int(rng.random() * len(others))] if others else None


class Question(NamedTuple):
    """text: a phrase, or ``VISUAL`` beside a box. box: normalised cxcywh of the canvas."""

    text: str
    box: tuple[float, ...] | None = None


QuestionItem = tuple[ImageItem, tuple[Question, ...], tuple[BadInput, ...]]


class QuestionDataset(Dataset[QuestionItem]):
    """Each image the book has phrases for, with ``per_image`` questions, and what was unreadable on the way to it.

    The questions depend on ``seed``, the key and ``epoch`` alone; the view is number ``epoch`` mod ``views``. Training
    never dies of one bad image: that of the next readable key takes its place.
    """

    def __init__(
        self, book: PhraseBook, transform: ViewTransform, seed: int = 0, epoch: int = 0, views: int = 1
    ) -> None:
        self.book, self.seed, self.epoch = book, seed, epoch
        self.images = ImageDataset(book.source, transform, book.keys, seed, epoch % views)

    @property
    def identity(self) -> list[str]:
        """What tells the items from those of other data: images and what can be asked about each."""
        return ["\n".join((key, *self.book.phrases(key))) for key in self.book.keys]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> QuestionItem:
        """Raises ``UserError`` after 64 unreadable images in a row."""
        if not 0 <= index < len(self):
            raise IndexError(index)  # what ends a plain ``for``
        bad: list[BadInput] = []
        for step in range(min(_TRIES, len(self))):
            item = self.images[(index + step) % len(self)]
            if isinstance(item, ImageItem):
                try:
                    return item, self._questions(item), tuple(bad)
                except BadImage as error:
                    item = error.bad
            bad.append(item)
        raise UserError(f"{len(bad)} images in a row cannot be read, first {bad[0].key}: {bad[0].reason}")

    def _questions(self, item: ImageItem) -> tuple[Question, ...]:
        config, rng = self.book.config, random.Random(f"questions/{self.seed}/{self.epoch}/{item.key}")
        boxes = self._boxes(item) if config.boxes > 0 else []
        words, shown = _endless(self.book.phrases(item.key), rng), _endless(boxes, rng)
        questions = []
        for _ in range(config.per_image):
            by_box, by_absence = rng.random() < config.boxes, rng.random() < config.negatives
            if by_box and boxes:
                questions.append(Question(VISUAL, self._exemplar(next(shown), item, rng)))
            else:
                absent = self.book.absent(item.key, rng) if by_absence else None
                questions.append(Question(absent or next(words)))
        return tuple(questions)

    def _boxes(self, item: ImageItem) -> list[list[float]]:
        """xyxy on the canvas of the objects that this view shows with a pixel or more."""
        boxes = torch.from_numpy(self.book.source.boxes(item.key))
        placed = self.images.transform.boxes(boxes, item.original_size, item.seed)
        return placed[_has_area(placed)].tolist()

    def _exemplar(self, box: list[float], item: ImageItem, rng: random.Random) -> tuple[float, ...]:
        """As a hand would draw it: each edge off by a share of the side, two standard deviations at most."""
        jitter, exact = self.book.config.jitter, torch.tensor(box)
        noise = torch.tensor([max(-2.0, min(2.0, rng.gauss(0.0, 1.0))) for _ in range(4)])
        height, width = item.size
        drawn = exact + noise * jitter * (exact[2:] - exact[:2]).repeat(2)
        drawn = drawn.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        drawn = torch.where(_has_area(drawn), drawn, exact)
        return tuple(xyxy_to_cxcywh(drawn / item.image.shape[-1]).tolist())


def _endless(deck: Sequence[T], rng: random.Random) -> Iterator[T]:
    """In random order, over and over: nothing comes twice before everything came once."""
    return cycle(sorted(deck, key=lambda _: rng.random()))


def _has_area(boxes: Float[Tensor, "*n 4"]) -> Tensor:
    """Whether a box spans a pixel or more in both directions."""
    return (boxes[..., 2:] - boxes[..., :2] >= 1).all(-1)


def collate_questions(items: Sequence[QuestionItem]) -> tuple[ImageBatch, ConceptPrompts, list[BadInput]]:
    """One batch, its questions image by image, and what was unreadable.

    One exemplar slot if anything in the batch shows a box, none otherwise; the slots of words have label -10.
    """
    batch, _ = collate_images([item for item, _, _ in items])
    assert batch is not None
    questions = [(number, question) for number, (_, asked, _) in enumerate(items) for question in asked]
    prompts = ConceptPrompts.words([q.text for _, q in questions], [number for number, _ in questions])
    if any(q.box is not None for _, q in questions):
        boxes = torch.tensor([q.box or (0.0, 0.0, 0.0, 0.0) for _, q in questions])
        labels = torch.tensor([-10 if q.box is None else 1 for _, q in questions])
        prompts = ConceptPrompts(prompts.texts, prompts.image, boxes[:, None], labels[:, None])
    return batch, prompts, [bad for _, _, found in items for bad in found]
