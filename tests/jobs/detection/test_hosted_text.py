"""A hosted student with a small text encoder in the place of its host's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hosted_students import TRUNK, assert_equal, built, heads, questions, saved_trunk
from tiny_detection import Recipe, save_text
from transformers import Sam3LiteTextModel

import samdistill as sd
from samdistill.inference.concepts import load_concept_model
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.detection.plan import plan_detection
from samdistill.pipeline import check, train
from samdistill.types import UserError


def test_a_small_text_encoder_stays_in_its_host(hosted: Recipe, lite: Path, tmp_path: Path) -> None:
    model = Sam3LiteTextModel.from_pretrained(lite)
    config = hosted(tmp_path / "run", f"student.host={lite}", "train.batch_size=8")
    student = built(config)
    assert_equal(heads(student.state_dict()), heads(model.state_dict()))
    assert plan_detection(config).student_params == sum(p.numel() for p in student.parameters())
    train(config)
    opened, (images, prompts) = load_concept_model(config.output), questions()
    assert isinstance(opened.model, Sam3LiteTextModel)
    assert_equal(heads(opened.model.state_dict()), heads(model.state_dict()))
    assert opened.answer(images, prompts).pred_logits.shape == (3, 10)


def test_a_text_encoder_goes_in_as_a_merge_puts_it(hosted: Recipe, detector, tmp_path: Path) -> None:
    """The student is the one of ``student.host`` with the merged folder, and so are its context and its file."""
    text, lite = save_text(tmp_path / "text", context=5), tmp_path / "lite"
    sd.merge(text, detector[1], lite)
    merged = load_concept_model(lite)
    config = hosted(tmp_path / "run", f"student.text_encoder={text}", "train.batch_size=8")
    parts, student = DetectionParts(config), built(config)
    assert isinstance(student.model, Sam3LiteTextModel)
    assert_equal(student.state_dict(), built(hosted(tmp_path / "run", f"student.host={lite}")).state_dict())
    assert parts.words.context == parts.kind.context == merged.words.context == 5 < parts.teacher.words.context
    assert not parts.kind.shares_text(0)
    assert plan_detection(config).student_params == sum(p.numel() for p in student.parameters())
    report = check(config, device="cpu")
    assert report.ok and all(name.startswith(TRUNK) for name in report.trainable)
    train(config)
    opened, (images, prompts) = load_concept_model(config.output), questions()
    assert_equal(heads(opened.model.state_dict()), heads(merged.model.state_dict()))
    assert opened.words.context == 5 and opened.answer(images, prompts).pred_logits.shape == (3, 10)
    torch.testing.assert_close(opened.text(prompts), merged.text(prompts))
    assert train(config).images_per_second == 0  # the checkpoint has no text encoder, the run is found finished
    torch.manual_seed(77)
    save_text(text, context=5)  # other weights
    with pytest.raises(UserError, match="trained with other frozen parameters than the student now has"):
        train(config)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda place: None, "student.text_encoder={0}: no such file or folder; train it first"),
        (lambda place: saved_trunk(place), "student.text_encoder={0}: .* no student of kind samdistill_text here"),
        (
            lambda place: save_text(place, 16),
            "student.text_encoder={0}: the text encoder gives 16 channels, but the heads of .* read 32; train it",
        ),
        (
            lambda place: save_text(place, 32, 99),
            "student.text_encoder={0}: the text encoder has a vocabulary of 99 tokens, but the tokenizer of .* has",
        ),
    ],
    ids=["missing", "another job's", "width", "vocabulary"],
)
def test_a_text_encoder_that_does_not_fit_is_one_line(
    hosted: Recipe, tmp_path: Path, made: Callable[[Path], object], said: str
) -> None:
    place = tmp_path / "text"
    made(place)
    with pytest.raises(UserError, match=said.format(place)) as refused:
        plan_detection(hosted(tmp_path / "run", f"student.text_encoder={place}"))
    assert "\n" not in str(refused.value)


def test_two_small_text_encoders_are_one_too_many(
    hosted: Recipe, lite: Path, words_run: Path, detector, tmp_path: Path
) -> None:
    given = f"student.text_encoder={words_run}"
    with pytest.raises(UserError, match=r"student.host=.* has a small text encoder of its own; leave student.text_enc"):
        plan_detection(hosted(tmp_path / "run", given, f"student.host={lite}"))
    other = built(hosted(tmp_path / "run", given, f"student.host={detector[1]}"))
    assert_equal(other.state_dict(), built(hosted(tmp_path / "run", given)).state_dict())
    with pytest.raises(UserError, match=r"a described student has no student\.text_encoder"):
        hosted(tmp_path / "run", given, "student.kind=described", "student.head=fused", "match.method=greedy")
