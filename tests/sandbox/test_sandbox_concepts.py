"""The sandbox's words: every phrase can be read, and an absent one is absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from samdistill.checkpoints.words import Words
from samdistill.sandbox.concepts import (
    CONTEXT,
    GENERIC,
    PHRASES,
    VOCABULARY,
    absent_phrase,
    build_tokenizer,
    phrases_of,
    sandbox_words,
)
from samdistill.sandbox.scenes import COLOURS, SHAPES, render_scenes
from samdistill.types import VISUAL


def test_every_phrase_is_read_as_its_own_words() -> None:
    tokenizer = build_tokenizer()
    for phrase in (*PHRASES, GENERIC, VISUAL):
        ids = tokenizer(phrase)["input_ids"]
        assert tokenizer.unk_token_id not in ids and len(ids) <= CONTEXT and sandbox_words().fits(phrase)
        assert [VOCABULARY[number] for number in ids] == ["<bos>", *phrase.split(), "<eos>"]
    assert len(PHRASES) == len(set(PHRASES)) == 10 + 12 + 120
    assert tokenizer("Zebra")["input_ids"] == [2, tokenizer.unk_token_id, 3]
    assert tokenizer("RED Heart")["input_ids"] == tokenizer("red heart")["input_ids"]


def test_ids_are_the_order_that_the_packaged_weights_know() -> None:
    assert VOCABULARY[:9] == ("<pad>", "<unk>", "<bos>", "<eos>", "object", "visual", "thing", "small", "medium")
    assert VOCABULARY[10:22] == tuple(COLOURS) and VOCABULARY[22:] == SHAPES and len(VOCABULARY) == 32


def test_a_saved_tokenizer_is_the_same_words(tmp_path: Path) -> None:
    sandbox_words().save(tmp_path)
    found = Words.load(tmp_path, len(VOCABULARY), CONTEXT)
    assert found.digest == sandbox_words().digest and found.context == CONTEXT
    assert AutoTokenizer.from_pretrained(tmp_path)("pink ring")["input_ids"] == build_tokenizer()("pink ring").input_ids


def test_phrases_of_leaves_sizes_out() -> None:
    assert phrases_of(("star", "red", "small", "red star", "small star", "small red star")) == (
        "star", "red", "red star",
    )  # fmt: skip


def test_an_absent_phrase_applies_to_nothing_and_often_nearly_does() -> None:
    rng, near, count = np.random.default_rng(0), 0, 0
    for names in render_scenes(range(120), 28, 5).concepts:
        present = [phrases_of(own) for own in names]
        shapes, colours = {own[0] for own in present}, {own[1] for own in present}
        for _ in range(5):
            words = absent_phrase(present, rng).split()
            colour, shape = (
                next((w for w in words if w in COLOURS), None),
                next((w for w in words if w in SHAPES), None),
            )
            applies = [(colour in (None, own[1])) and (shape in (None, own[0])) for own in present]
            assert words and len(words) == (colour is not None) + (shape is not None) and not any(applies)
            near += colour in colours or shape in shapes
            count += 1
    assert 0.3 < near / count < 0.8


def test_of_a_scene_with_every_phrase_but_one_that_one_is_absent() -> None:
    everything = [(shape, colour, f"{colour} {shape}") for shape in SHAPES for colour in COLOURS]
    everything.remove(("star", "red", "red star"))
    assert absent_phrase(everything, np.random.default_rng(0)) == "red star"
    assert absent_phrase([], np.random.default_rng(0)) in PHRASES


@pytest.mark.parametrize("seed", range(3))
def test_the_generator_decides(seed: int) -> None:
    first, again = (
        [absent_phrase([("star", "red", "red star")], rng) for _ in range(20)]
        for rng in (np.random.default_rng(seed), np.random.default_rng(seed))
    )
    assert first == again and len(set(first)) > 5
