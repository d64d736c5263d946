"""Questions of the detection job: phrases from a list, a file or the labels, and boxes of annotated objects."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from ..config import QuestionsConfig
from ..reading import Table, parse_json
from ..types import VISUAL, ConceptPrompts, ImageBatch, UserError
from .labels import ImageLabels, Labels
from .loader import ImageDataset, ImageItem, collate_images, next_usable
from .skipped import BadInput
from .sources import Source
from .transforms import ViewTransform

T = TypeVar("T")


def _plain(phrase: str) -> str:
    """Replace every run of whitespace by one space."""
    return " ".join(phrase.split())


def _read_line(line: str) -> tuple[str, list[str]]:
    """Parse the key and the phrases of a line.

    Raises:
        ValueError: The line has neither of the two documented forms.
    """
    entry = parse_json(line, Table)
    if sorted(entry) not in (["key", "phrases"], ["caption", "key"]):
        got = f"fields {sorted(entry)}"
        raise ValueError(f'{got}; a line is {{"key": .., "phrases": [..]}} or {{"key": .., "caption": ".."}}')
    phrases = entry["phrases"] if "phrases" in entry else [entry["caption"]]
    if not isinstance(entry["key"], str) or not isinstance(phrases, list):
        raise ValueError("'key' is a text and 'phrases' a list of texts")
    if not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
        raise ValueError("a phrase or caption is empty or not a text")
    return entry["key"], [_plain(phrase) for phrase in phrases]


def _read_lines(path: Path) -> dict[str, list[str]]:
    """Read phrases by key. Lines with the same key are combined, because COCO has several captions per image."""
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
    """Phrases that can be asked about each image of a data set.

    Attributes:
        keys: Keys of the images with phrases, sorted.
        unasked: Images without phrases.
        vocabulary: All phrases, sorted.
        dropped: Phrases that ``fits`` refuses. They are never asked, because a truncated phrase has another meaning.
    """

    def __init__(self, config: QuestionsConfig, source: Source, fits: Callable[[str], bool] | None = None) -> None:
        """Collect the phrases.

        Args:
            config: The ``questions`` block of a configuration.
            source: The images.
            fits: Returns whether a phrase fits into the text encoder's context. None accepts every phrase.

        Raises:
            UserError: The file is invalid, boxes are configured without labels, or no image has a phrase.
        """
        if config.boxes > 0 and not source.labelled:
            raise UserError("the data set has no annotated objects whose boxes could be shown; set questions.boxes=0")
        self.config, self.source = config, source
        asked = self._listed()
        words = set(source.vocabulary) if config.source == "names" else {p for own in asked.values() for p in own}
        if "" in map(str.strip, words):  # of names alone: a file and a config are checked where they are read
            raise UserError("questions.source=names: a category has an empty name; give each a name in words")
        unfit = {phrase for phrase in words if fits is not None and not fits(phrase)}
        why = "longer than a text encoder's context, so it is never asked"
        self.dropped = [BadInput(repr(phrase), why) for phrase in sorted(unfit)]
        self._words = words - unfit
        self.vocabulary = tuple(sorted(self._words))
        if unfit:
            asked = {key: tuple(p for p in own if p not in unfit) for key, own in asked.items()}
        self._phrases = {key: own for key, own in asked.items() if own}
        self.keys = sorted(self._phrases)
        self.unasked = [BadInput(key, "has no phrase") for key in source.keys if key not in self._phrases]
        if not self.keys:
            long = f"; {len(unfit)} phrases are too long, such as {min(unfit)!r}" if unfit else ""
            raise UserError(f"questions.source={config.source}: no image has a phrase{long}")

    def _listed(self) -> dict[str, tuple[str, ...]]:
        """Return the phrases of each key from the configured source."""
        keys = self.source.keys
        if self.config.source == "generic":
            return dict.fromkeys(keys, tuple(dict.fromkeys(_plain(phrase) for phrase in self.config.generic)))
        if self.config.source == "names":
            return {key: tuple(self.source.phrases(key)) for key in keys}
        assert self.config.file is not None  # validated by the config
        lines = _read_lines(self.config.file)
        found = {key: tuple(dict.fromkeys(lines[key])) for key in keys if key in lines}
        if not found:
            raise UserError(f"{self.config.file}: none of its {len(lines)} keys is in the data set; "
                            f"keys look like {keys[0]!r}, not {min(lines)!r}")  # fmt: skip
        return found

    def phrases(self, key: str) -> tuple[str, ...]:
        """Return the phrases of an image. As far as is known, their objects are in the image."""
        return self._phrases[key]

    def absent(self, key: str, rng: random.Random) -> str | None:
        """Draw a phrase that the image does not have, uniformly.

        If the data set lists phrases that are known to be absent from the image, it is one of them.

        Returns:
            The phrase, or None if the image has all phrases. Phrases that differ in upper and lower case are equal.
        """
        listed = self.source.absent(key) if self.config.source == "names" else None
        if known := [phrase for phrase in listed or () if phrase in self._words]:
            return known[int(rng.random() * len(known))]
        own = {phrase.casefold() for phrase in self._phrases[key]}
        for _ in range(16):
            phrase = self.vocabulary[int(rng.random() * len(self.vocabulary))]
            if phrase.casefold() not in own:
                return phrase
        others = [phrase for phrase in self.vocabulary if phrase.casefold() not in own]
        return others[int(rng.random() * len(others))] if others else None


class Question(NamedTuple):
    """One question about an image.

    Attributes:
        text: A phrase, or ``VISUAL`` for a question with a box.
        box: Box of an example object, cxcywh as fractions of the canvas, or None.
        labels: What the annotations say. None if they are not read, or say nothing about the question.
    """

    text: str
    box: tuple[float, ...] | None = None
    labels: Labels | None = None


QuestionItem = tuple[ImageItem, tuple[Question, ...], tuple[BadInput, ...]]
"""An image, its questions, and the inputs that were unreadable when this item was read."""


class QuestionDataset(Dataset[QuestionItem]):
    """Images with ``per_image`` questions each.

    The questions depend on ``seed``, the key and ``epoch`` only. The view has number ``epoch % views``. If an image
    cannot be read, the next readable key takes its place, so training continues.

    Args:
        book: The images and their phrases.
        transform: Augmentation and geometry.
        seed: Seed of the run.
        epoch: Number of the epoch.
        views: Number of different views of an image.
        keys: Images of the book that are asked about. None for all.
        label_side: Side of the masks of labels. None for a run without labels.
        labelled: Whether the questions of this epoch have labels.
    """

    def __init__(
        self, book: PhraseBook, transform: ViewTransform, seed: int = 0, epoch: int = 0, views: int = 1,
        keys: Sequence[str] | None = None, label_side: int | None = None, labelled: bool = True,
    ) -> None:  # fmt: skip
        self.book, self.seed, self.epoch = book, seed, epoch
        self.label_side, self.labelled = label_side, labelled
        self.images = ImageDataset(book.source, transform, book.keys if keys is None else keys, seed, epoch % views)

    @property
    def identity(self) -> list[str]:
        """Strings that distinguish these items from those of other data: each key with its phrases and labels."""
        return ["\n".join((key, *self.book.phrases(key), *self._label_digest(key))) for key in self.images.keys]

    def _label_digest(self, key: str) -> tuple[str, ...]:
        """Return a digest of the annotation, for a run with labels alone."""
        if self.label_side is None:
            return ()
        return (hashlib.blake2b(self.book.source.label_digest(key), digest_size=8).hexdigest(),)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> QuestionItem:
        """Read item ``index``.

        Raises:
            UserError: 64 images in a row are unreadable.
        """
        return next_usable(self._item, index, len(self), len(self))

    def _item(self, index: int, bad: list[BadInput]) -> QuestionItem:
        item = self.images.item(index)
        return item, self._questions(item), tuple(bad)

    def _questions(self, item: ImageItem) -> tuple[Question, ...]:
        config, rng = self.book.config, random.Random(f"questions/{self.seed}/{self.epoch}/{item.key}")
        boxes = self._boxes(item) if config.boxes > 0 else []
        labels = self._labels(item)
        words, shown = _endless(self.book.phrases(item.key), rng), _endless(boxes, rng)
        questions = []
        for _ in range(config.per_image):
            by_box, by_absence = rng.random() < config.boxes, rng.random() < config.negatives
            if by_box and boxes:
                number, box = next(shown)
                about = None if labels is None else labels.of_box(number)
                questions.append(Question(VISUAL, self._exemplar(box, item, rng), about))
            else:
                absent = self.book.absent(item.key, rng) if by_absence else None
                phrase = absent or next(words)
                questions.append(Question(phrase, None, None if labels is None else labels.of_phrase(phrase)))
        return tuple(questions)

    def _labels(self, item: ImageItem) -> ImageLabels | None:
        if self.label_side is None or not self.labelled:
            return None
        return ImageLabels(self.book.source, self.images.transform, item, self.label_side)

    def _boxes(self, item: ImageItem) -> list[tuple[int, list[float]]]:
        """Return number and box of the objects that are visible with at least one pixel in each direction.

        Boxes are xyxy on the canvas.
        """
        boxes = torch.from_numpy(self.book.source.boxes(item.key))
        placed = self.images.transform.boxes(boxes, item.original_size, item.seed)
        return [(number, placed[number].tolist()) for number in _has_area(placed).nonzero()[:, 0].tolist()]

    def _exemplar(self, box: list[float], item: ImageItem, rng: random.Random) -> tuple[float, ...]:
        """Jitter a box as ``prompts.jittered`` does. If it then has no area, the exact box is returned."""
        jitter, exact = self.book.config.jitter, torch.tensor(box)
        noise = torch.tensor([max(-2.0, min(2.0, rng.gauss(0.0, 1.0))) for _ in range(4)])
        height, width = item.size
        drawn = exact + noise * jitter * (exact[2:] - exact[:2]).repeat(2)
        drawn = drawn.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        drawn = torch.where(_has_area(drawn), drawn, exact)
        return tuple(box_convert(drawn / item.image.shape[-1], "xyxy", "cxcywh").tolist())


def _endless(deck: Sequence[T], rng: random.Random) -> Iterator[T]:
    """Repeat the items of a shuffled deck without end."""
    return cycle(sorted(deck, key=lambda _: rng.random()))


def _has_area(boxes: Float[Tensor, "*n 4"]) -> Tensor:
    """Return whether a box is at least one pixel wide and high."""
    return (boxes[..., 2:] - boxes[..., :2] >= 1).all(-1)


def collate_questions(items: Sequence[QuestionItem]) -> tuple[ImageBatch, ConceptPrompts, list[BadInput]]:
    """Collate items into one batch.

    Returns:
        The images, the questions in the order of the images, and the unreadable inputs. If any question has a box,
        there is one exemplar slot, whose label is -10 for questions without a box; otherwise there is none.
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
