"""Merging a text encoder keeps vision and heads bit for bit, and refuses whatever would not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Sam3LiteTextModel, Sam3Model

from samdistill.checkpoints.merge import merge
from samdistill.inference.concepts import load_concept_model
from samdistill.sandbox.concepts import CONTEXT, VOCABULARY, sandbox_words
from samdistill.students import StudentTrunk, StudentTrunkConfig, TextStudent, TextStudentConfig
from samdistill.teachers import Sam3Detector
from samdistill.types import ConceptPrompts, ImageBatch, UserError

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
         "projection_dim": 16}  # fmt: skip


def text_student(folder: Path, vocabulary: int = 1000, width: int = 32, context: int = 8) -> TextStudent:
    torch.manual_seed(3)
    config = TextStudentConfig(**SMALL, vocab_size=vocabulary, width=width, max_position_embeddings=context)
    student = TextStudent(config)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    student.eval().save_pretrained(folder / "student")
    return student


def opened(folder: Path) -> Sam3LiteTextModel:
    model, found = Sam3LiteTextModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(found.values()), found
    return model.eval()


@pytest.mark.parametrize(("name", "width"), [("sam3", 32), ("video", 128)])
def test_the_result_has_the_student_and_every_other_tensor_of_the_detector(name, width, hosts, tmp_path) -> None:
    host, folder = hosts[name]
    student = text_student(tmp_path / "run", width=width)
    report = merge(tmp_path / "run", folder, tmp_path / "merged")
    merged = opened(tmp_path / "merged").state_dict()
    own = student.state_dict()
    assert all(torch.equal(merged[key], value) for key, value in own.items())
    detector = getattr(host, "detector_model", host).state_dict()
    kept = {key for key in detector if not key.startswith(("text_encoder.", "text_projection."))}
    assert set(merged) == kept | set(own) and all(torch.equal(merged[key], detector[key]) for key in kept)
    was, now = load_file(folder / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert set(report.kept) | set(report.added) == set(now) and set(report.added) == set(own)
    assert len(report.kept) + len(report.removed) == len(was)
    assert any("tracker is left out" in note for note in report.notes) == (name == "video")
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == report.to_dict()


@pytest.fixture
def speaking(hosts, tmp_path):
    """(model, folder) of a detector that reads the sandbox's words."""
    config = hosts["sam3"][0].config.__class__.from_dict(hosts["sam3"][0].config.to_dict())
    config.text_config.vocab_size, config.text_config.max_position_embeddings = len(VOCABULARY), CONTEXT
    torch.manual_seed(5)
    model = Sam3Model(config).eval()
    model.save_pretrained(tmp_path / "teacher")
    sandbox_words().save(tmp_path / "teacher")
    return model, tmp_path / "teacher"


def test_the_merged_model_answers_with_the_students_tokens_and_the_teachers_heads(speaking, tmp_path, near) -> None:
    _, folder = speaking
    student = text_student(tmp_path / "run", len(VOCABULARY), context=4)
    sandbox_words().save(tmp_path / "run" / "student")
    with pytest.raises(UserError, match="a text encoder without a vision encoder: `samdistill merge"):
        load_concept_model(tmp_path / "run")
    merge(tmp_path / "run", folder, tmp_path / "merged")
    merged = load_concept_model(tmp_path / "merged")
    assert isinstance(merged, Sam3Detector) and merged.words.context == 4
    ids, mask = merged.words.encode(["red circle", "star"])
    with torch.no_grad():
        wanted = student(ids, mask).last_hidden_state
        near(merged.model.get_text_features(ids, mask, return_dict=True).pooler_output, wanted)
    images = ImageBatch.full(torch.randint(0, 256, (2, 3, 126, 126), dtype=torch.uint8))
    prompts = ConceptPrompts.words(["red circle", "star"], [0, 1])
    answer, before = merged.answer(images, prompts), load_concept_model(folder).answer(images, prompts)
    near(answer.fpn[0], before.fpn[0])  # the vision encoder is the teacher's
    assert not torch.allclose(answer.pred_logits, before.pred_logits)


def test_trunk_and_text_encoder_go_into_one_model_in_either_order(hosts, student, tmp_path) -> None:
    _, folder = hosts["sam3"]
    text_student(tmp_path / "run")
    _, trunk = student
    merge(tmp_path / "run", folder, tmp_path / "words")
    merge(trunk, tmp_path / "words", tmp_path / "both")
    merge(trunk, folder, tmp_path / "seeing")
    merge(tmp_path / "run", tmp_path / "seeing", tmp_path / "both again")
    one, other = opened(tmp_path / "both"), opened(tmp_path / "both again")
    assert isinstance(one.vision_encoder.backbone, StudentTrunk)
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_an_original_file_gives_a_folder_of_its_detector(hosts, original_state, student, tmp_path) -> None:
    host, folder = hosts["sam3"]
    torch.save({"model": original_state}, tmp_path / "sam3.pt")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    text_student(tmp_path / "run")
    merge(tmp_path / "run", tmp_path / "sam3.pt", tmp_path / "merged")
    merged, before = opened(tmp_path / "merged").state_dict(), host.state_dict()
    kept = [key for key in before if not key.startswith(("text_encoder.", "text_projection."))]
    assert all(torch.equal(merged[key], before[key]) for key in kept)
    merge(student[1], tmp_path / "sam3.pt", tmp_path / "seeing.pt")  # a file with a student as its trunk
    merge(tmp_path / "run", tmp_path / "seeing.pt", tmp_path / "both")
    both = opened(tmp_path / "both")
    assert isinstance(both.vision_encoder.backbone, StudentTrunk)
    trunk, own = student[0].state_dict(), both.vision_encoder.backbone.state_dict()
    assert trunk.keys() == own.keys() and all(torch.equal(value, own[key]) for key, value in trunk.items())


@pytest.mark.parametrize(
    ("settings", "into", "problem"),
    [
        ({"width": 16}, "sam3", "gives 16 channels, but the heads of .* read 32; train it with this teacher"),
        ({"vocabulary": 900}, "sam3", "a vocabulary of 900 tokens, but the tokenizer of .* has 1000"),
        ({}, "tracker", "a 'sam3_tracker' model takes no words, so it cannot host a text encoder"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(settings, into, problem, hosts, tmp_path) -> None:
    text_student(tmp_path / "run", **settings)
    with pytest.raises(UserError, match=problem) as error:
        merge(tmp_path / "run", hosts[into][1], tmp_path / "merged")
    assert "\n" not in str(error.value) and not (tmp_path / "merged").exists()


def test_prefixes_and_a_damaged_student_are_refused(hosts, tmp_path) -> None:
    text_student(tmp_path / "run")
    with pytest.raises(UserError, match="are for an image trunk"):
        merge(tmp_path / "run", hosts["sam3"][1], tmp_path / "merged", target_prefix="x.")
    config = tmp_path / "run" / "student" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"hidden_size": 32, "projection_dim": 32}))
    with pytest.raises(UserError, match=r"wrong checkpoint: .* of the text student has the shape"):
        merge(tmp_path / "run", hosts["sam3"][1], tmp_path / "merged")
    assert StudentTrunkConfig.model_type not in config.read_text()
