"""The text job through its verbs: it learns phrases that it was not trained on, and what cannot work is one line."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, Sam3LiteTextModel

from samdistill.checkpoints.loading import open_config, pretrained
from samdistill.checkpoints.rename_efficientsam3 import text_to_theirs
from samdistill.cli import main
from samdistill.data.phrases import normalised
from samdistill.engine import read_lines
from samdistill.inference.concepts import load_concept_model
from samdistill.jobs import JOBS
from samdistill.jobs.base import DISTILLED, TEACHER, UNTRAINED, Given
from samdistill.jobs.text.evaluate import _nearest
from samdistill.jobs.text.parts import TextParts
from samdistill.pipeline import cache, plan, run_pipeline
from samdistill.sandbox.concepts import PHRASES, VOCABULARY
from samdistill.students import TextStudent, TextStudentConfig
from samdistill.types import UserError


@pytest.fixture(scope="module")
def finished(text, scenes, tmp_path_factory):
    """A run with all stages: 24 epochs on 114 of the sandbox's phrases."""
    config = text(
        tmp_path_factory.mktemp("text") / "run", "train.epochs=24", "train.lr=1e-2",
        f"evaluate.concepts={scenes}/concepts_val.json",
    )  # fmt: skip
    return run_pipeline(config)


def test_the_loss_falls_on_phrases_that_were_not_trained_on(finished) -> None:
    logged = [line["validate"] for line in read_lines(finished.config.output / "metrics.jsonl") if "validate" in line]
    assert len(logged) == 24 and logged[-1]["total"] < 0.5 * logged[0]["total"]
    assert set(logged[0]) == {*finished.config.term_names(), "total"}
    rows = finished.evaluated.result
    assert rows.row(DISTILLED).cosine > rows.row(UNTRAINED).cosine + 0.2
    assert rows.row(TEACHER).cosine == pytest.approx(1, abs=1e-5) and rows.row(TEACHER).own_nearest == 1
    assert finished.verdict.startswith("Learned: cosine")


def test_no_evaluated_phrase_was_trained_on(finished) -> None:
    book = TextParts(finished.config).book
    result = finished.evaluated.result
    assert set(book.train).isdisjoint(book.held_out) and len(book.train) + len(book.held_out) == len(PHRASES)
    assert (result.phrases, result.trained) == (len(book.held_out), len(book.train)) == (28, 114)
    assert set(result.cosines[DISTILLED]) == set(book.held_out)


def test_the_merged_model_gives_the_tokens_of_the_student(finished, near) -> None:
    folder = finished.config.output / "student"
    student = pretrained(TextStudent, open_config(folder, TextStudentConfig), folder, folder)
    merged = load_concept_model(finished.merged.out)
    assert isinstance(merged.model, Sam3LiteTextModel)
    ids, mask = merged.words.encode(list(PHRASES[:20]))
    with torch.no_grad():
        wanted = student(ids, mask).last_hidden_state
        near(merged.model.get_text_features(ids, mask, return_dict=True).pooler_output, wanted)
    assert load_concept_model(finished.config.output).words.context == merged.words.context  # the run itself opens too
    processor = AutoProcessor.from_pretrained(finished.merged.out)
    assert processor(text=list(PHRASES[:20]))["input_ids"] == ids.tolist()
    assert AutoProcessor.from_pretrained(folder).get_vocab() == processor.tokenizer.get_vocab()


def test_the_result_is_whole_and_the_report_shows_it(finished) -> None:
    saved = json.loads((finished.config.output / "evaluation.json").read_text())
    assert saved["excluded"] == 0 and [row["name"] for row in saved["models"]] == [TEACHER, UNTRAINED, DISTILLED]
    student = saved["models"][2]
    assert {"1 word", "2 words"} >= set(student["by_length"]) and student["by_rarity"]
    assert student["cgf1"] is not None and saved["new_questions"] > 0 and student["cgf1_new"] is not None
    page = finished.report.read_text()
    for shown in ("cosine of the end token", "nearest to itself", "cgF1, new phrases", "28 phrases that were not"):
        assert shown in page
    assert "tokens: cosine" in finished.summary() and "merged model: " in finished.summary()


def _questions(folder: Path) -> Path:
    path = folder / "questions.json"
    path.write_text(json.dumps({"images": [{"text_input": text} for text in ("a star", "Star", "ring", "tree")]}))
    return path


def test_phrases_of_an_evaluation_set_are_kept_out_and_counted(text, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("A Red_Circle\nstar\nring\nunheard of\n")
    config = text(tmp_path / "run", f"data.exclude=[{tmp_path}/val.txt]", "data.held_out_fraction=0")
    found = plan(config)
    assert found.excluded == 3 and found.phrases == len(PHRASES) - 3 + 1 and found.held_out == 3
    assert found.facts()["excluded"] == "3 phrase(s) of the evaluation sets; 1 that a model cannot read"
    assert [bad.key for bad in found.skipped] == ["'unheard of'"]
    asked = plan(text(tmp_path / "run", f"evaluate.concepts={_questions(tmp_path)}", "data.held_out_fraction=0"))
    assert "2 phrase(s) of evaluate.concepts are trained on" in asked.facts()["excluded"]
    assert not {"red circle", "star", "ring"} & set(TextParts(config).book.train)


def test_a_word_of_no_trained_phrase_is_reported_and_composed_phrases_teach_it(text, tmp_path: Path) -> None:
    """The embedding of a token that no phrase has gets no gradient, so it stays random."""
    (tmp_path / "asked.json").write_text(json.dumps({"images": [{"text_input": t} for t in ("object", "star")]}))
    settings = [f"evaluate.concepts={tmp_path}/asked.json", "data.held_out_fraction=0.2"]
    without, given = (text(tmp_path / "run", *settings, f"data.composed={count}") for count in (0, 200))
    assert plan(without).untaught == ("object",) and "such as 'object'" in plan(without).facts()["words"]
    assert plan(given).untaught == () and "words" not in plan(given).facts()
    gradients = []
    for config in (without, given):
        parts = TextParts(config.run_online())
        task = parts.task()
        batch = task.to(task.collate([(at, text) for at, text in enumerate(parts.trained)]), torch.device("cpu"))
        student = task.build_student()
        task.terms(student, batch).total.backward()
        table = student.text_encoder.embeddings.token_embedding.weight.grad
        gradients.append(table[parts.words.encode(["object"])[0][0, 1]].norm().item())
    assert gradients[0] == 0 < gradients[1]


def test_composed_phrases_have_every_word_and_no_evaluated_phrase(text, tmp_path: Path) -> None:
    config = text(tmp_path / "run", f"evaluate.concepts={_questions(tmp_path)}", "data.composed=150")
    parts = TextParts(config)
    found = {normalised(phrase) for phrase in parts.composed}
    assert len(found) == len(parts.composed) == plan(config).composed == 150
    assert not found & {normalised(p) for p in (*parts.book.train, *parts.book.held_out, "star", "ring", "visual")}
    asked = Counter(word for phrase in parts.composed for word in phrase.split())
    assert set(asked) == {word for word in VOCABULARY if word.isalpha()} and max(asked.values()) < 2 * min(
        asked.values()
    )
    assert all(parts.words.fits(phrase) for phrase in parts.composed)
    assert parts.items == len(parts.phrases) + 150 and "visual" in parts.phrases
    report = cache(config, device="cpu", progress=False)
    assert report.records == len(parts.trained) + len(parts.others) and plan(config).cache_bytes == report.bytes


def test_a_cache_is_complete_verified_and_shared_by_any_context(text, tmp_path: Path) -> None:
    config = text(tmp_path / "run")
    report = cache(config, device="cpu", progress=False)
    assert report.records == report.written == len(PHRASES) + 1 and plan(config).cache_bytes == report.bytes
    again = cache(text(tmp_path / "run", "student.context=4"), device="cpu", progress=False, verify=True)
    assert (again.written, again.verified, again.worst_error) == (0, 4, pytest.approx(0, abs=1e-5))
    signals = TextParts(config).signals()
    asked = ["star", "red circle", "star"]
    (stored,), (ran,) = signals.answer(asked, signals.read(asked)), TextParts(config).teacher().features(asked)
    torch.testing.assert_close(stored, ran, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["data.phrases=[{0}/empty.txt]"], "empty.txt: holds no phrase"),
        (["data.phrases=[{0}/none.txt]"], "none.txt: cannot be read"),
        (["student.context=2"], "no phrase is left to train on: of 142, .* is longer than the 2 tokens"),
        (["student.size=s9"], "student.size"),
        (["student.size={{hidden: 15, layers: 3, heads: 2, ffn: 16}}"], "hidden=15 is not a multiple of heads=2"),
        (["data.phrases=[]"], "data.phrases"),
        (["data.held_out_fraction=1.0"], "no phrase is left to train on"),
        (["train.batch_size=500"], "fewer than one batch"),
        (["teacher.kind=sam"], "only SAM 3 answers questions in words"),
        (["student.start={0}"], "no student of kind samdistill_text here"),
    ],
)
def test_what_cannot_work_is_one_line(text, tmp_path: Path, capsys, settings: list[str], problem: str) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "run.yaml").write_text(text(tmp_path / "run", "cache.mode=online").to_yaml())
    assert main(["train", str(tmp_path / "run.yaml"), *(one.format(tmp_path) for one in settings)]) == 2
    said = capsys.readouterr().err
    assert re.search(problem, said), said
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1, said


def test_a_student_of_another_vocabulary_is_refused_as_a_start(text, tmp_path: Path, capsys) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16,
            "projection_dim": 16, "max_position_embeddings": 6}  # fmt: skip
    other = TextStudent(TextStudentConfig(**size, vocab_size=99, width=32))
    other.save_pretrained(tmp_path / "other")
    config = text(tmp_path / "run", f"student.start={tmp_path}/other", "cache.mode=online")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert "token_embedding.weight of this student has the shape (99, 16)" in capsys.readouterr().err


def test_a_run_can_start_from_a_file_of_efficientsam3_with_its_padding(text, tmp_path: Path) -> None:
    config = text(tmp_path / "run", "student.attend_padding=true", "cache.mode=online")
    student = TextParts(config).task().build_student()
    assert student.config.attend_padding
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter)
    torch.save({"model": text_to_theirs(student.state_dict())}, tmp_path / "text.pth")
    settings = [f"student.start={tmp_path}/text.pth", "cache.mode=online"]
    # the file has no number of heads; EfficientSAM3's have 64 channels each
    alike = ["student.size={hidden: 16, layers: 3, heads: 1, ffn: 16}", "student.attend_padding=true"]
    other = TextParts(text(tmp_path / "other", *settings, *alike)).task().build_student()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in student.state_dict().items())
    for size, said in ((alike[:1], "attend_padding True, but this student has False"),
                       (alike[1:], "num_attention_heads 1, but this student has 2")):  # fmt: skip
        with pytest.raises(UserError, match=f"text.pth: a text encoder with {said}"):
            TextParts(text(tmp_path / "other", *settings, *size)).task().build_student()


def test_a_run_can_start_from_another_one(finished, text, tmp_path: Path) -> None:
    config = text(tmp_path / "run", f"student.start={finished.config.output}", "cache.mode=online")
    student = TextParts(config).task().build_student()
    folder = finished.config.output / "student"
    trained = pretrained(TextStudent, open_config(folder, TextStudentConfig), folder, folder)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in student.state_dict().items())


def test_run_takes_a_file_or_the_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for name in ("a.txt", "annotations/b.json", "readme.md"):
        (tmp_path / name).write_text("x")
    job = JOBS["text"]
    recipe, settings = job.begin(Given(tmp_path, {"sandbox": 1.0}, "s1"))
    assert recipe == "text/s0" and 'student.size="s1"' in settings
    assert f'data.phrases=["{tmp_path}/a.txt", "{tmp_path}/annotations/b.json"]' in settings
    _, settings = job.begin(Given(tmp_path / "a.txt", {"sandbox": 1.0}, str(tmp_path)))
    assert f'data.phrases=["{tmp_path}/a.txt"]' in settings and f'student.start="{tmp_path}"' in settings
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no file of phrases in it"):
        job.begin(Given(tmp_path / "none", {"sandbox": 1.0}, None))


def test_confusions_are_those_computed_by_hand() -> None:
    gallery = torch.eye(3)
    pooled = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.6, 0.8]])
    wrong, share = _nearest(pooled, gallery, ("red", "pink", "blue"))
    assert share == 0.5 and [(one.phrase, one.nearest) for one in wrong] == [("pink", "blue")]
    assert (wrong[0].cosine, wrong[0].own) == pytest.approx((0.8, 0.6))
