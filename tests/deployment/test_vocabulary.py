"""The phrases of --vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import samdistill as sd
from samdistill.deployment.parts_detector import bake
from samdistill.deployment.vocabulary import phrases_of
from samdistill.errors import UserError
from samdistill.types import VISUAL


@pytest.fixture(scope="module")
def student():
    return sd.load("sandbox-student", device="cpu").network


def test_a_list_text_and_a_file_say_the_same(student, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("red circle\n\n star \n")
    wanted = ("red circle", "star")
    for given in (["red circle", "star"], " red  circle,star", tmp_path / "words.txt", str(tmp_path / "words.txt")):
        assert phrases_of(given, student.words) == wanted


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("", "no phrase given"), (" ", "no phrase given"), ([], "no phrase given"),
        ("red circle,,star", "phrase 2 is empty"),
        ("star, star", "'star' is given twice"), ("xyzzy", "does not know the word 'xyzzy'"),
        ("words/none.txt", "words/none.txt: no such file"), ("red " * 40, "is longer than the"),
        (VISUAL, "stands for example boxes"),
        ("red circle,Red Circle", "'Red Circle' is the same to this model as 'red circle'"),
    ],
)  # fmt: skip
def test_what_cannot_be_baked_is_one_line(student, given, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        phrases_of(given, student.words)
    assert "\n" not in str(error.value)


def test_baked_words_are_the_text_encoders(student) -> None:
    """Row by row the features that the model computes for the phrase alone, with the hidden phrases at the end."""
    baked = bake(student, ("star", "red circle"))
    assert baked.phrases == ("star", "red circle", VISUAL) and baked.shown == 2
    for row, phrase in enumerate(baked.phrases):
        ids, mask = student.words.encode([phrase])
        with torch.no_grad():
            code = student.model.get_text_features(ids, mask, return_dict=True).pooler_output
        assert torch.equal(baked.features[row], code[0]) and torch.equal(baked.mask[row], mask[0])
