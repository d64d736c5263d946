"""The text run that a hosted student with a small text encoder needs first: its phrases, its folder, its place."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path

import pytest
from tiny_detection import TRUNK_PHASES, Recipe
from tiny_detection import small as tiny
from transformers import Sam3LiteTextModel

import samdistill as sd
from samdistill import pipeline
from samdistill.cli import main
from samdistill.config import Run
from samdistill.data import open_source
from samdistill.data.questions import PhraseBook
from samdistill.jobs import JOBS
from samdistill.jobs.base import Given
from samdistill.jobs.detection import job as detection_job
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.detection.plan import plan_detection
from samdistill.jobs.fitting import fitted
from samdistill.jobs.images import Images
from samdistill.jobs.loading import load_config
from samdistill.sandbox.concepts import PHRASES
from samdistill.students import TextStudent
from samdistill.types import UserError

RECIPE = """extends: text/sandbox
student: {size: {hidden: 16, layers: 3, heads: 2, ffn: 16}, context: 5}
train: {epochs: 1, batch_size: 20, warmup_epochs: 0}
data: {passes: 1, composed: 0}
cache: {verify_records: 2}
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A recipe of the text job of a second."""
    path = tmp_path / "words.yaml"
    path.write_text(RECIPE)
    return f"student.text_recipe={path}"


def before(config: DetectionRunConfig) -> Run:
    (run,) = JOBS["detection"].before(config)
    return run


def test_its_phrases_are_those_of_the_questions(hosted: Recipe, small: str, tmp_path: Path) -> None:
    config = hosted(tmp_path / "run", small)
    run = before(config)
    source = open_source(config.data, "train")
    names = {name for key in source.keys for name in source.phrases(key)}
    lines = (tmp_path / "run" / "phrases.txt").read_text().splitlines()
    assert set(lines) == names and len(lines) == len(names) and names < set(PHRASES)
    assert run.data.held_out_fraction == 0  # every name is learned
    assert run.data.phrases == (str(tmp_path / "run" / "phrases.txt"),)
    assert (run.output, run.teacher.path) == (tmp_path / "run" / "text", config.teacher.path)
    keys = source.keys
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"key": k, "phrases": ["star", "red"]}) + "\n" for k in keys))
    before(hosted(tmp_path / "run", small, f"questions={{source: jsonl, file: {tmp_path / 'p.jsonl'}}}"))
    assert (tmp_path / "run" / "phrases.txt").read_text() == "red\nstar\n"
    own = before(hosted(tmp_path / "run", small, "student.text_phrases=[sandbox]"))
    generic = before(hosted(tmp_path / "run", small, "questions={source: generic, negatives: 0}"))
    assert own.data.phrases == generic.data.phrases == ("sandbox",)


def test_a_small_vocabulary_is_passed_over_until_an_epoch_has_enough_steps(
    hosted: Recipe, small: str, tmp_path: Path
) -> None:
    run = before(hosted(tmp_path / "run", small))
    count = JOBS["text"].train_items(run.model_copy(update={"data": run.data.model_copy(update={"passes": 1})}))
    assert run.train.batch_size == count // 4 < 20 and run.data.passes > 1
    assert JOBS["text"].plan(run).steps_per_epoch >= 20 > 20 - count // run.train.batch_size
    some = tmp_path / "composed.yaml"
    some.write_text(RECIPE.replace("composed: 0", "composed: 900"))
    own = before(hosted(tmp_path / "run", f"student.text_recipe={some}"))
    assert (
        900 <= own.data.passes * count < 900 + count and JOBS["text"].train_items(own) == 900 + own.data.passes * count
    )
    full = before(hosted(tmp_path / "run", "student.text_recipe=text/sandbox", "student.text_phrases=[sandbox]"))
    recipe = load_config("text/sandbox")
    assert full.train == recipe.train and full.data == recipe.data


def test_a_small_data_set_shortens_the_warm_up_of_each_phase() -> None:
    recipe = load_config("detection/hosted", ["train.phases=[{name: a, epochs: 15, lr: 1e-3, warmup_steps: 500}]"])
    few, many, own = fitted(recipe, 20, ()), fitted(recipe, 100_000, ()), fitted(recipe, 20, ["train.phases=[]"])
    assert few.train.batch_size == 5 and few.train.phases[0].warmup_steps == 15 * (20 // 5) // 10
    assert many.train.phases == own.train.phases == recipe.train.phases


def test_a_plan_knows_the_encoder_before_it_is_made_and_a_check_names_the_command(
    hosted: Recipe, small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = hosted(tmp_path / "run", small, "train.batch_size=2")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main(["plan", str(tmp_path / "run.yaml")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not made yet; `samdistill run` makes it first, or give student.text_encoder" in said
    for verb in ("check", "train"):
        assert main([verb, str(tmp_path / "run.yaml")]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert "no text encoder there yet: `samdistill run` trains it before" in said[-1], said
    for use in (plan_detection, before):  # a plan knows no phrases, the run that is made gets them
        with pytest.raises(UserError, match=r"student.text_recipe=detection/sandbox: a recipe of the detection job"):
            use(hosted(tmp_path / "run", "student.text_recipe=detection/sandbox"))
        with pytest.raises(UserError, match=r"student\.text_recipe=text/s9: no config 'text/s9'"):
            use(hosted(tmp_path / "run", "student.text_recipe=text/s9"))


@pytest.fixture
def walk(detector: tuple[object, Path], scenes: Path, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """walk(): ``demo`` with a tiny teacher, whose student needs a text run."""

    def render(root: Path, *, format: str) -> None:
        assert format == "coco"
        shutil.copytree(scenes, root, dirs_exist_ok=True)

    monkeypatch.setattr(detection_job, "render_sandbox", render)
    settings = [s for s in tiny(detector[1], scenes, tmp_path, ()) if not s.startswith(("output=", "data.root="))]
    settings += [TRUNK_PHASES, small, "train.batch_size=8", "evaluate.images=1"]
    return lambda: pipeline.demo(tmp_path, "detection", overrides=settings)


def test_one_call_makes_both_and_a_second_one_repeats_nothing_of_the_first(
    walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, stop = tmp_path / "run" / "text", KeyboardInterrupt
    evaluate = type(JOBS["text"]).evaluate
    monkeypatch.setattr(type(JOBS["text"]), "evaluate", lambda *_: (_ for _ in ()).throw(stop))
    with pytest.raises(stop):
        walk()
    assert (text / "student").is_dir() and not (text / "summary.txt").exists()
    trained = (text / "student" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(type(JOBS["text"]), "evaluate", evaluate)
    result = walk()
    assert result.config.output == tmp_path / "run" and "cgF1" in result.summary()
    said = capsys.readouterr().out
    assert (text / "student" / "model.safetensors").stat().st_mtime_ns == trained
    assert "text: plan" in said and "text: train" in said and not (text / "merged").exists()
    (first,) = result.earlier
    assert first.job == "text" and any(line.startswith("tokens: cosine") for line in first.figures)
    page = html.unescape(result.report.read_text())
    assert 'href="text/report.html"' in page and (text / "report.html").is_file() and first.figures[-1] in page
    student, words = (
        Sam3LiteTextModel.from_pretrained(tmp_path / "run" / "student"),
        TextStudent.from_pretrained(text / "student"),
    )
    own = student.state_dict()
    assert all((own[name] == value).all() for name, value in words.state_dict().items())
    assert sd.load(tmp_path / "run").network is not None
    files = ("ckpt_epoch_1.pt", "student/model.safetensors", "evaluation.json", "report.html", "summary.txt")
    before = {text / name: (text / name).stat().st_mtime_ns for name in files}
    monkeypatch.setattr(type(JOBS["text"]), "evaluate", lambda *_: pytest.fail("evaluated again"))
    assert walk().earlier == result.earlier and "text: train    finished before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("layout", "student", "wanted"),
    [
        ("coco", None, ("detection/hosted", "text/s0", "es_rv_l", "names")),
        ("coco", "es_ev_m", ("detection/hosted", "text/s0", "es_ev_m", "names")),
        ("folder", None, ("detection/hosted", None, "es_rv_l", "generic")),
    ],
)
def test_run_begins_with_a_hosted_student_and_a_small_text_encoder_where_there_are_phrases(
    scenes: Path, layout: str, student: str | None, wanted: tuple[str | None, ...]
) -> None:
    data = scenes if layout == "coco" else scenes / "images" / "val"
    recipe, settings = JOBS["detection"].begin(Given(data, {"sandbox": 1.0}, student))
    config = load_config(recipe, settings)
    found = (recipe, config.student.text_recipe, config.student.backbone, config.questions.source)
    assert found == wanted and config.student.kind == "hosted"
    assert (config.questions.boxes > 0) == (layout == "coco")  # a folder of images has no boxes to ask with
    assert PhraseBook(config.questions, Images(config).train_source).vocabulary


def test_run_goes_on_from_a_student_of_its_kind(hosted: Recipe, lite: Path, scenes: Path, tmp_path: Path) -> None:
    sandbox = Path(sd.__file__).parent / "sandbox" / "weights" / "student"
    recipe, settings = JOBS["detection"].begin(Given(scenes, {"sandbox": 1.0}, str(sandbox)))
    assert recipe == "detection/efficient_sam3" and load_config(recipe, settings).student.start == sandbox
    first = hosted(tmp_path / "first", f"student.host={lite}")
    student = DetectionParts(first).task().build_student()
    student.model.save_pretrained(tmp_path / "first" / "student")
    recipe, settings = JOBS["detection"].begin(Given(scenes, {first.teacher.path: 1.0}, str(tmp_path / "first")))
    sizes = ["student.backbone=es_ev_s", "student.head=strided", "train.precision=fp32"]
    config = load_config(recipe, [*settings, *sizes])
    assert isinstance(config, DetectionRunConfig) and config.text_encoder is None
    again = DetectionParts(config).task().build_student().state_dict()
    assert all((again[name] == value).all() for name, value in student.state_dict().items())


def test_the_demo_takes_the_hosted_recipe_with_its_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection_job, "render_sandbox", lambda *a, **k: None)
    config = load_config(*JOBS["detection"].demo(tmp_path))
    assert (config.student.kind, config.student.text_recipe) == ("hosted", "text/sandbox")
    assert config.student.text_phrases == load_config("text/sandbox").data.phrases
