"""Phrases of every form of file, and their division: what is evaluated is never trained on."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from samdistill.data.phrases import PhraseDataset, PhraseList, compose, normalised, read_phrases
from samdistill.types import UserError


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The  Traffic-light ", "traffic light", True),
        ("traffic_light", "TRAFFIC LIGHT", True),
        ("a cat", "cat", True),
        ("ﬁre hydrant", "fire hydrant", True),  # a ligature
        ("a", "an", False),
        ("red car", "car red", False),
        ("cats", "cat", False),
    ],
)
def test_phrases_are_compared_by_their_words(one: str, other: str, same: bool) -> None:
    assert (normalised(one) == normalised(other)) is same


COCO = {
    "images": [{"id": 1}], "annotations": [],
    "categories": [{"id": 1, "name": "puffer_(fish)"}, {"id": 2, "name": "tap", "synonyms": ["faucet"]}],
}  # fmt: skip
SACO = {"images": [{"id": 1, "text_input": "a red car"}, {"id": 2, "text_input": "tree"}], "annotations": []}


@pytest.mark.parametrize(
    ("name", "content", "phrases"),
    [
        ("a.txt", "red  car\n\ntree\nred car\n", ["red car", "tree", "red car"]),
        ("a.jsonl", '"red car"\n{"phrase": "tree"}\n{"key": "x", "phrases": ["a", "b"]}\n',
         ["red car", "tree", "a", "b"]),
        ("a.json", json.dumps(["red car", "tree"]), ["red car", "tree"]),
        ("a.json", json.dumps(COCO), ["puffer fish", "tap", "faucet"]),
        ("a.json", json.dumps(SACO), ["a red car", "tree"]),
    ],
)  # fmt: skip
def test_every_form_of_file_is_read(tmp_path: Path, name: str, content: str, phrases: list[str]) -> None:
    (tmp_path / name).write_text(content)
    assert read_phrases(tmp_path / name) == phrases


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", " \n\n", "holds no phrase"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read"),
        ("a.csv", "red car", "not a file of phrases; give one of .txt, .jsonl, .json"),
        ("a.jsonl", '"red car"\n{"word": "x"}\n', 'a.jsonl:2: a line is a text, {"phrase": ..}'),
        ("a.jsonl", '{"phrases": "x"}\n', "a.jsonl:1: a line is a text"),
        ("a.jsonl", "{\n", "a.jsonl:1: "),
        ("a.json", "{", "not a readable JSON file"),
        ("a.json", "{}", "holds no phrase"),
        ("a.json", '{"categories": [{"id": 1}]}', "categories entry 0 has no text"),
        ("a.json", '{"categories": 5}', "'categories' is not a list of objects"),
        ("a.json", '{"images": [{"text_input": 3}]}', "images entry 0 has no text"),
        ("a.json", "[1]", "list entry 0 has no text"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, name: str, content: str | bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_phrases(path)
    assert problem in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        read_phrases(tmp_path / "none.txt")


CAPTIONS = {"images": [], "annotations": [{"caption": "A cat on a mat."}], "categories": []}


def test_captions_without_spacy_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)  # as if it were not installed
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps(CAPTIONS))
    with pytest.raises(UserError, match=r"spaCy or its model is missing; pip install 'samdistill\[captions\]', then"):
        read_phrases(path)
    path.with_suffix(".jsonl").write_text('{"caption": "A cat."}')
    with pytest.raises(UserError, match="has captions"):
        read_phrases(path.with_suffix(".jsonl"))


def test_captions_give_their_noun_phrases_without_articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for spaCy, which is no dependency: every word after an article is a noun phrase."""

    def parse(caption: str) -> SimpleNamespace:
        words = [SimpleNamespace(text=w, pos_="DET" if w.lower() == "a" else "NOUN") for w in caption[:-1].split()]
        return SimpleNamespace(noun_chunks=[words[:2], words[3:]])

    fake = SimpleNamespace(load=lambda *_, **__: SimpleNamespace(pipe=lambda texts: map(parse, texts)))
    monkeypatch.setitem(sys.modules, "spacy", fake)
    path = tmp_path / "stand_in.json"
    path.write_text(json.dumps(CAPTIONS))
    assert read_phrases(path) == ["cat", "mat"]


def divide(phrases: list[str], evaluated: list[str] = [], fraction: float = 0.0, long: str = "") -> PhraseList:  # noqa: B006
    return PhraseList.divide(phrases, evaluated, fraction, 0, lambda text: "too long" if text == long else None)


def test_phrases_of_the_evaluation_sets_are_kept_out_however_they_are_written() -> None:
    book = divide(["red car", "Traffic-Light", "the tree", "cat"], ["traffic light", "tree", "dog"])
    assert book.train == ("red car", "cat") and book.excluded == 2
    assert book.held_out == ("Traffic-Light", "the tree", "dog")
    assert not {normalised(phrase) for phrase in book.train} & {normalised(phrase) for phrase in book.held_out}


def test_a_phrase_that_occurs_twice_is_trained_once() -> None:
    book = divide(["red car", "Red  car", "cat", "red car"])
    assert book.train == ("red car", "cat") and book.repeated == 2


def test_a_share_is_held_out_by_a_hash_that_does_not_depend_on_the_order() -> None:
    phrases = [f"thing {number}" for number in range(50)]
    book, again = divide(phrases, fraction=0.2), divide(phrases[::-1], fraction=0.2)
    assert len(book.held_out) == 10 and set(book.held_out) == set(again.held_out)
    assert set(book.train) | set(book.held_out) == set(phrases)
    more = divide(phrases, fraction=0.4)
    assert set(book.held_out) < set(more.held_out)


def test_composed_phrases_deal_every_word_equally_often_and_repeat_no_phrase() -> None:
    words = [f"w{number}" for number in range(40)]
    found = compose(words, 100, 3, lambda phrase: phrase.startswith("w1 "))
    assert len(found) == len(set(found)) == 100 and found == compose(words, 100, 3, lambda phrase: phrase[:3] == "w1 ")
    assert found != compose(words, 100, 4, lambda _: False) and not any(phrase.startswith("w1 ") for phrase in found)
    counts = Counter(word for phrase in found for word in phrase.split())
    assert set(counts) == set(words) and {1, 2, 3, 4} == {len(phrase.split()) for phrase in found}
    assert max(counts.values()) - min(counts[word] for word in words if word != "w1") <= 2


def test_composing_ends_where_no_other_phrase_is_left() -> None:
    assert sorted(compose(["a", "b"], 99, 0, lambda _: False, longest=1)) == ["a", "b"]
    assert compose([], 5, 0, lambda _: False) == compose(["a"], 5, 0, lambda _: True) == ()


def test_what_a_model_cannot_read_is_listed_and_nothing_left_is_one_line() -> None:
    book = divide(["red car", "cat"], long="red car")
    assert book.train == ("cat",) and book.dropped == (("'red car'", "too long"),)
    with pytest.raises(UserError, match=r"no phrase is left to train on: of 1, .* 1 cannot be read; 'cat' is too long"):
        divide(["cat"], long="cat")
    with pytest.raises(UserError, match="of 1, 1 are in the evaluation sets"):
        divide(["cat"], ["Cat"])


def test_rarity_is_that_of_the_rarest_word() -> None:
    book = divide(["red car", "red tree", "blue car"])
    assert [book.rarity(text) for text in ("red", "Blue car", "red car", "green car")] == [2, 1, 2, 0]


def test_items_follow_the_order_and_are_told_apart_by_the_phrases() -> None:
    data = PhraseDataset(("a", "b", "c"), [2, 0, 2])
    assert [data[i] for i in range(len(data))] == [(2, "c"), (0, "a"), (2, "c")]
    assert data.identity == PhraseDataset(("a", "b", "c")).identity != PhraseDataset(("a", "b")).identity
