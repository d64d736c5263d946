"""Tokenizer of a checkpoint, checked against the vocabulary of its text encoder."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..io import adding, as_path
from ..reading import foreign
from ..types import VISUAL, ConceptPrompts, UserError
from .files import locate
from .loading import quiet_transformers

_VOCABULARIES = ("tokenizer.json", "vocab.json")
WORD_FILES = ("tokenizer*.json", "vocab.json", "merges.txt", "*_tokens*.json", "config.json")


class Phrases(ABC):
    """What a detector reads: any phrase with a tokenizer (``Words``), or the concepts of a fixed list."""

    advice: str
    """What to do about a phrase that ``problem`` refuses."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> tuple[Int[Tensor, "p t"], Int[Tensor, "p t"]]:
        """Encode phrases.

        Args:
            texts: p phrases.

        Returns:
            Ids and mask (1 for ids, 0 for padding), both int64.

        Raises:
            UserError: A phrase cannot be read.
        """

    @abstractmethod
    def problem(self, text: str, reader: str = "this model") -> str | None:
        """Return why ``reader`` cannot read a phrase, such as ``longer than ...``, or None."""

    def fits(self, text: str) -> bool:
        """Whether ``encode`` accepts the phrase."""
        return bool(text.strip()) and self.problem(text) is None

    def unknown(self, text: str) -> list[str]:
        """Return the words of a phrase that the vocabulary lacks."""
        return []

    def inputs(self, prompts: ConceptPrompts, device: torch.device | str) -> dict[str, Tensor]:
        """Return the text and box inputs of ``EfficientSam3Model`` or ``ops.outputs.ask``.

        Args:
            prompts: p questions.
            device: Device of the result.

        Returns:
            ``input_ids`` and ``attention_mask`` (p, t), ``input_boxes`` (p, k, 4), normalised cxcywh, and
            ``input_boxes_labels`` (p, k), where -10 is padding.
        """
        ids, mask = self.encode(prompts.texts)
        found = {
            "input_ids": ids, "attention_mask": mask, "input_boxes": prompts.boxes, "input_boxes_labels": prompts.labels
        }  # fmt: skip
        return {name: tensor.to(device) for name, tensor in found.items()}


@dataclass(frozen=True)
class Words(Phrases):
    """Tokenizer that pads every phrase to the same length, ``context``, on the right.

    A text encoder with convolutions mixes words with their padding. Padding to the longest phrase of a batch would
    therefore make the result of a phrase depend on the other phrases.

    Args:
        tokenizer: The tokenizer.
        context: Largest number of tokens of a phrase, including the start and end tokens.

    Example:
        >>> words = Words.load("facebook/sam3", vocab_size=49408)
        >>> ids, mask = words.encode(["a red car"])
    """

    tokenizer: PreTrainedTokenizerFast
    context: int

    advice = "shorten it"

    @classmethod
    def load(cls, place: str | Path, vocab_size: int, context: int = 32) -> Words:
        """Load the tokenizer of a local folder, a ``tokenizer.json`` or a hub repository.

        Args:
            place: Folder, file or hub id.
            vocab_size: Rows of the text encoder's token table.
            context: Rows of the text encoder's position table. A tokenizer with a smaller limit lowers ``context``.

        Raises:
            UserError: There is no tokenizer, it has no padding token, or its number of tokens differs from
                ``vocab_size``. Ids of another vocabulary would be valid rows of the table but encode other words.
        """
        found = locate(place, WORD_FILES)
        tokenizer = read_tokenizer(found)
        count = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
        if count != vocab_size:
            raise UserError(
                f"{found}: the tokenizer has {count} tokens, but the text encoder has {vocab_size}; "
                "give the tokenizer that the checkpoint was trained with"
            )
        if tokenizer.pad_token_id is None:
            raise UserError(f"{found}: no padding token; put the tokenizer_config.json of the same model beside it")
        with foreign(found, "not a readable tokenizer"):
            return cls(tokenizer, min(context, tokenizer.model_max_length))

    def encode(self, texts: Sequence[str]) -> tuple[Int[Tensor, "p t"], Int[Tensor, "p t"]]:
        """Tokenize phrases.

        Args:
            texts: p phrases.

        Returns:
            Token ids and attention mask (1 for tokens, 0 for padding), both int64 of shape (p, ``context``).

        Raises:
            UserError: A phrase is empty or too long.
        """
        if not all(text.strip() for text in texts):
            raise UserError(f"a phrase is empty; for prompts with boxes only, use the phrase {VISUAL!r}")
        ids = torch.full((len(texts), self.context), int(self.tokenizer.pad_token_id), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (text, tokens) in enumerate(zip(texts, self._tokens(texts), strict=True)):
            if len(tokens) > self.context:
                raise UserError(
                    f"the phrase {text[:80]!r} has {len(tokens)} tokens with start and end, but at most "
                    f"{self.context} are allowed; shorten it"
                )
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        return ids, mask

    def problem(self, text: str, reader: str = "this model") -> str | None:
        """Return that ``reader`` does not read so many tokens, or None."""
        fits = len(self._tokens([text])[0]) <= self.context
        return None if fits else f"longer than the {self.context} tokens {reader} reads"

    def unknown(self, text: str) -> list[str]:
        """Return the words of a phrase that the vocabulary lacks.

        The list is empty for a tokenizer without an unknown token, such as CLIP's, which can spell every word.
        """
        lost = self.tokenizer.unk_token_id
        if lost is None or lost == self.tokenizer.eos_token_id:  # CLIP's tokenizer has no unknown words
            return []
        return [word for word in text.split() if lost in self._tokens([word])[0]]

    def tokens(self, texts: Sequence[str]) -> list[set[int]]:
        """Return the ids of the tokens of each phrase, with the start and end tokens."""
        return [set(ids) for ids in self._tokens(texts)] if texts else []

    def whole_words(self) -> tuple[str, ...]:
        """Return the words of letters that are one token, sorted."""
        special, size = set(self.tokenizer.all_special_ids), len(self.tokenizer)
        decoded = {number: self.tokenizer.decode([number]).strip() for number in range(size) if number not in special}
        words = {word: number for number, word in decoded.items() if word.isalpha()}
        alone = self.tokenizer(list(words), add_special_tokens=False, padding=False, verbose=False)["input_ids"]
        return tuple(sorted(word for (word, number), ids in zip(words.items(), alone, strict=True) if ids == [number]))

    def save(self, folder: str | Path) -> None:
        """Save the tokenizer with its context, so that ``load`` and transformers' ``AutoTokenizer`` can read it."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.model_max_length = self.context
        with adding(as_path(folder)) as new:
            tokenizer.save_pretrained(new)

    @property
    def digest(self) -> str:
        """SHA-256 in hexadecimal over everything that determines the token ids of a phrase."""
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # The backend stores padding and truncation of its last call, which do not belong to the vocabulary.
        about = {**rules, "padding": self.tokenizer.pad_token_id, "truncation": self.context}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        # Padding is done in `encode`: a fast tokenizer keeps the padding of its last call and would save it.
        return self.tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]


def read_tokenizer(place: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a folder or of a ``tokenizer.json``. Raises ``UserError`` if there is none."""
    folder = place.parent if (place.parent / "tokenizer_config.json").is_file() and place.is_file() else place
    # AutoTokenizer invents a vocabulary of two tokens for a SAM 3 folder without one, so this is checked first.
    if folder.is_dir() and not any((folder / name).is_file() for name in _VOCABULARIES):
        raise UserError(
            f"{folder}: no tokenizer ({' or '.join(_VOCABULARIES)}) here; set teacher.tokenizer to the checkpoint's"
        )
    with foreign(place, "not a readable tokenizer"), quiet_transformers():
        if folder.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(folder))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
