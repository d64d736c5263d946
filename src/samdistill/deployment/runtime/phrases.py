"""Phrases to token ids, or to rows of a fixed vocabulary."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .files import Array, ModelError, read_json

_SHORT = re.compile("'(?:s|t|re|ve|m|ll|d)")
_OTHER_LETTERS = re.compile(
    "[\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]"
)
_SPACES = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000").union(map(chr, range(0x2000, 0x200B)))
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-pair encoding writes as they are
_BYTES = {v: chr(v) for v in _PLAIN} | {v: chr(256 + n) for n, v in enumerate(sorted({*range(256)} - {*_PLAIN}))}


class Tokenizer:
    """Tokenizer of the ``tokenizer.json`` of a folder: CLIP's byte-pair encoding, or a list of whole words."""

    def __init__(self, folder: Path) -> None:
        rules, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
        model = rules["model"]
        if model["type"] not in ("BPE", "WordLevel"):
            raise ModelError(f"{folder / 'tokenizer.json'}: a {model['type']} tokenizer is not supported")
        self._vocabulary, self._suffix = model["vocab"], model.get("end_of_word_suffix") or ""
        self._unknown = self._vocabulary.get(model.get("unk_token") or "")
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges", ())]
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._bytes = model["type"] == "BPE"
        self._added = {one["content"]: one for one in rules.get("added_tokens", ())}
        self._steps = _steps(rules.get("normalizer"))
        self._before, self._after = _frame(rules.get("post_processor"))
        self.context, padding = int(settings["model_max_length"]), settings["pad_token"]
        self._padding = self._id(padding["content"] if isinstance(padding, dict) else padding)

    def encode(self, phrase: str) -> tuple[Array, Array]:
        """Return token ids and attention mask of a phrase, int64 of shape (1, ``context``)."""
        if not phrase.strip():
            raise ModelError("a phrase is empty; give a noun phrase such as 'red car'")
        tokens = self.tokens(phrase)
        if len(tokens) > self.context:
            raise ModelError(f"{phrase[:80]!r} is longer than the {self.context} tokens this model reads; shorten it")
        ids, mask = np.full((1, self.context), self._padding), np.zeros((1, self.context), np.int64)
        ids[0, : len(tokens)], mask[0, : len(tokens)] = tokens, 1
        return ids, mask

    def tokens(self, phrase: str) -> list[int]:
        """Return the token ids of a phrase with start and end, without padding."""
        found = list(self._before)
        for text, added in self._split(phrase, False):
            if added:
                found.append(self._id(text))
                continue
            for step in self._steps:
                text = step(text)
            for part, special in self._split(text, True):
                found += [self._id(part)] if special else [i for word in self._words(part) for i in self._pieces(word)]
        return found + self._after

    def _id(self, token: str) -> int:
        return int(self._added[token]["id"] if token in self._added else self._vocabulary[token])

    def _split(self, text: str, normalised: bool) -> Iterator[tuple[str, bool]]:
        """Cut added tokens out of a text, those that are looked for before or after normalisation."""
        wanted = [name for name, one in self._added.items() if bool(one.get("normalized")) == normalised]
        rule = "|".join(map(re.escape, sorted(wanted, key=len, reverse=True))) or "(?!)"
        for place, part in enumerate(re.split(f"({rule})", text)):
            if part:
                yield part, bool(place % 2)

    def _words(self, text: str) -> Iterator[str]:
        """Cut a text into words: CLIP's rule, or words and punctuation."""
        start = 0
        while start < len(text):
            kind, end = _kind(text[start], self._bytes), start + 1
            if self._bytes and (short := _SHORT.match(text, start)):
                end = short.end()
            else:
                while end < len(text) and kind != "number" and _kind(text[end], self._bytes) == kind:
                    end += 1
            if kind != "space":
                yield text[start:end]
            start = end

    def _pieces(self, word: str) -> list[int]:
        """Return the ids of one word."""
        parts = [word]
        if self._bytes:
            parts = [_BYTES[value] for value in word.encode("utf-8")]
            parts[-1] += self._suffix
            while len(parts) > 1:
                ranks = [self._ranks.get(pair, math.inf) for pair in pairwise(parts)]
                best = min(range(len(ranks)), key=ranks.__getitem__)
                if ranks[best] == math.inf:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
        ids = [self._vocabulary.get(part, self._unknown) for part in parts]
        return [number for number in ids if number is not None]


def _kind(character: str, clip: bool) -> str:
    """Return the class of a character that a word is made of."""
    if character in _SPACES:
        return "space"
    category = unicodedata.category(character)
    if clip:
        return {"L": "letter", "N": "number"}.get(category[0], "other")
    letter = category[0] in "LM" or category in ("Nd", "Nl", "Pc") or _OTHER_LETTERS.match(character)
    return "letter" if letter else "other"


def _steps(rule: Mapping[str, Any] | None) -> list[Any]:
    """Return the functions of a normaliser."""
    if rule is None:
        return []
    kind = rule["type"]
    if kind == "Sequence":
        return [step for one in rule["normalizers"] for step in _steps(one)]
    if kind == "Lowercase":  # per character, without Python's rule for a final sigma
        return [lambda text: "".join(map(str.lower, text))]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return [lambda text: unicodedata.normalize(kind, text)]
    if kind == "Replace" and rule["pattern"].get("Regex") == r"\s+":
        spaces = re.compile(f"[{''.join(sorted(_SPACES))}]+")
        return [lambda text: spaces.sub(rule["content"], text)]
    raise ModelError(f"tokenizer.json: the normaliser {kind} is not supported")


def _frame(rule: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    """Return the tokens before and after a phrase."""
    if rule is None:
        return [], []
    if rule["type"] == "RobertaProcessing":
        return [int(rule["cls"][1])], [int(rule["sep"][1])]
    if rule["type"] != "TemplateProcessing":
        raise ModelError(f"tokenizer.json: the post-processor {rule['type']} is not supported")
    names = [one.get("SpecialToken", {}).get("id") for one in rule["single"]]  # None is the phrase
    ids = [[] if name is None else rule["special_tokens"][name]["ids"] for name in names]
    place = names.index(None)
    return [n for one in ids[:place] for n in one], [n for one in ids[place:] for n in one]


class Vocabulary:
    """The fixed list of concepts of a model without a text encoder: ``vocabulary.json``."""

    def __init__(self, folder: Path) -> None:
        found = read_json(folder / "vocabulary.json")
        self.phrases: list[str] = list(found["phrases"])
        self._rows = {phrase: row for row, phrase in enumerate([*self.phrases, *found.get("hidden", ())])}

    def row(self, phrase: str) -> int:
        """Return the index of a phrase. Raises ``ModelError`` if it is not in the list."""
        if phrase not in self._rows:
            raise ModelError(f"{phrase[:80]!r} is not a concept of this model; it knows: {', '.join(self.phrases)}")
        return self._rows[phrase]
