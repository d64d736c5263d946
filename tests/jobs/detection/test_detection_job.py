"""The detection job as a user runs it: plan, check, train, predict, demo, and what each of them refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_detection import DESCRIBED, OUTPUTS, TERMS, Recipe, small
from transformers import AutoProcessor, AutoTokenizer

from samdistill import pipeline
from samdistill.cli import main
from samdistill.config import packaged
from samdistill.data import open_source
from samdistill.engine import FitResult
from samdistill.engine import fit as engine_fit
from samdistill.inference.concepts import StudentDetector, load_concept_model
from samdistill.inference.predict import predict
from samdistill.jobs.detection import job as detection_job
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.label_terms import LABEL_TERMS
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.detection.plan import plan_detection
from samdistill.jobs.detection.student import student_kind
from samdistill.jobs.loading import load_config
from samdistill.pipeline import RunResult, check, run_pipeline, train
from samdistill.sandbox.concepts import CONTEXT
from samdistill.students import build_detector
from samdistill.teachers import describe_detector
from samdistill.types import UserError

DETECTION = [name for name in packaged() if name.startswith("detection/")]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """refused(argv): the one line of a command that must end as a user's error."""

    def run(argv: list[str]) -> str:
        capsys.readouterr()
        assert main(argv) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and text.startswith(f"samdistill {argv[0]}: "), text
        return text

    return run


def written(config: DetectionRunConfig, path: Path) -> str:
    path.write_text(config.to_yaml())
    return str(path)


@pytest.fixture(scope="module")
def walked(detection: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[DetectionRunConfig, RunResult]:
    """The whole road of a described student: an epoch of each phase over 16 scenes."""
    config = detection(tmp_path_factory.mktemp("road") / "run", "train.batch_size=8")
    return config, run_pipeline(config)


def test_plan_counts_what_is_built(detection: Recipe, tmp_path: Path) -> None:
    config = detection(tmp_path / "run", "train.batch_size=5", "train.ema=0.9")
    found = plan_detection(config)
    student = build_detector(student_kind(config, describe_detector(config.teacher)).model_config)
    built = {name: sum(p.numel() for p in module.parameters()) for name, module in student.named_children()}
    assert found.parts == built and sum(built.values()) == found.student_params
    assert found.student_params == sum(p.numel() for p in student.parameters())
    assert (found.student_fp16_bytes, found.queries, found.teacher_queries) == (2 * found.student_params, 4, 10)
    assert (found.image_size, found.teacher_levels) == (126, (36, 18, 9))
    assert found.weights_and_optimiser_bytes == found.student_params * 4 * 5
    held = plan_detection(detection(tmp_path / "run", "train.freeze=[{match: [vision_encoder.*]}]"))
    assert held.weights_and_optimiser_bytes == 4 * (4 * found.student_params - 3 * found.parts["vision_encoder"])
    assert (found.images, found.held_out_images, found.steps_per_epoch, found.steps) == (16, 4, 3, 9)
    assert found.phases == (("align", 3), ("features", 3), ("outputs", 3))
    assert not (tmp_path / "run").exists()


def test_plan_counts_the_images_that_can_be_asked_about(detection: Recipe, tmp_path: Path) -> None:
    config = detection(tmp_path)
    keys = open_source(config.data, "train").keys
    lines = "".join(json.dumps({"key": key, "phrases": ["circle"]}) + "\n" for key in keys[:7])
    (tmp_path / "asked.jsonl").write_text(lines)
    found = plan_detection(detection(tmp_path, f"questions={{source: jsonl, file: {tmp_path / 'asked.jsonl'}}}"))
    assert (found.images, found.steps_per_epoch) == (7, 1)


def test_plan_says_how_many_images_calibrate(detection: Recipe, tmp_path: Path) -> None:
    """All four held-out images where more are wanted. None that can be asked about is an error before training."""
    for wanted, used in ((0, 0), (3, 3), (4, 4), (500, 4)):
        config = detection(tmp_path / "run", f"calibration.images={wanted}")
        found = plan_detection(config)
        assert found.calibration_images == used
        assert found.facts().get("calibration") == (f"{used} held-out images" if used else None)
    task = DetectionParts(config).task()
    assert sum(len(images) for images, _ in task.held_out_questions(500)) == 4
    key = open_source(config.data, "train").keys[0]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"key": key, "phrases": ["circle"]}) + "\n")
    file = f"questions={{source: jsonl, file: {tmp_path / 'asked.jsonl'}}}"
    with pytest.raises(UserError, match=r"calibration\.images: questions\.file has no phrase of a held-out image"):
        plan_detection(detection(tmp_path / "run", file, "calibration.images=3"))


def test_check_prints_every_phase_and_succeeds(
    detection: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(detection(tmp_path / "run", "train.batch_size=2"), tmp_path / "run.yaml")
    assert main(["check", path, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["terms"]
    wanted = [("align", "fpn"), *(("features", n) for n in TERMS), *(("outputs", n) for n in OUTPUTS)]
    assert [(row["phase"], row["name"]) for row in rows] == wanted
    assert all(list(row) == ["name", "value", "weight", "grad_norm", "phase"] for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows) and not (tmp_path / "run").exists()


def test_a_weight_of_zero_fails_by_term_and_phase(detection: Recipe, tmp_path: Path, capsys) -> None:
    config = detection(tmp_path / "run", "train.batch_size=2", "loss.giou=0")
    assert main(["check", written(config, tmp_path / "run.yaml")]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"samdistill check: term 'giou' of phase '{phase}' does not reach the student: its weight is 0"
        for phase in ("features", "outputs")
    ]
    assert "align: fpn" in said.out and "outputs: giou" in said.out


@pytest.mark.parametrize("name", DETECTION)
def test_every_term_of_every_packaged_recipe_reaches_the_student(
    name: str, detector, words_run: Path, scenes: Path, tmp_path: Path
) -> None:
    sizes = DESCRIBED if load_config(name).student.kind == "described" else ()
    if load_config(name).student.kind == "hosted":
        sizes = (f"student.text_encoder={words_run}", "student.start=null", "questions.file=null")
    joint = name.startswith(("detection/hosted_joint", "detection/hosted_labels"))
    config = load_config(name, [*small(detector[1], scenes, tmp_path, sizes), "train.batch_size=2"])
    report = check(config, device="cpu")
    assert report.ok, report.problems
    rows = {phase: {t.name for t in report.terms if t.phase == phase} for phase, _ in config.train.phase_starts()}
    if name in ("detection/hosted", "detection/hosted_sandbox"):
        assert rows == {"trunk": {"trunk"}}
    elif joint:
        assert rows == {"joint": {*TERMS, *(LABEL_TERMS if name == "detection/hosted_labels_sandbox" else ())}}
    else:
        assert rows["features"] == set(TERMS) and rows["outputs"] == set(OUTPUTS)
    assert all(term.weight == getattr(load_config(name).loss, term.name) > 0 for term in report.terms)


def test_the_road_leaves_figures_and_a_report_with_three_rows(walked: tuple[DetectionRunConfig, RunResult]) -> None:
    config, result = walked
    figures = json.loads((config.output / "evaluation.json").read_text())
    names = [row["name"] for row in figures["models"]]
    assert names == ["teacher", "untrained", "distilled"]
    assert result.checked.ok and (result.trained.steps, result.trained.epochs) == (6, 3)
    assert set(result.trained.terms) == set(OUTPUTS)
    page = result.report.read_text()
    assert result.report == config.output / "report.html" and all(name in page for name in (*names, *TERMS))
    assert "cgF1" in result.summary() and str(result.report) in result.summary()
    trained, untrained = (result.evaluated.result.row(name) for name in ("distilled", "untrained"))
    assert trained.name != untrained.name


def test_a_second_call_goes_on_without_training_again(
    walked: tuple[DetectionRunConfig, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, first = walked
    kept = [first.trained.checkpoint, config.output / "student" / "model.safetensors"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    calls: list[FitResult] = []
    monkeypatch.setattr(pipeline, "fit", lambda *a, **k: calls.append(engine_fit(*a, **k)) or calls[-1])
    monkeypatch.setattr(detection_job.DetectionJob, "evaluate", lambda self, config, merged: first.evaluated)
    again = run_pipeline(config)
    assert len(calls) == 1 and again.trained.images_per_second == 0 and again.trained.terms == first.trained.terms
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_the_student_is_a_folder_that_answers_to_words(
    walked: tuple[DetectionRunConfig, RunResult], scenes: Path, tmp_path: Path
) -> None:
    config, result = walked
    model = load_concept_model(config.output)
    assert isinstance(model, StudentDetector) and result.trained.student == config.output / "student"
    saved = torch.load(result.trained.checkpoint, weights_only=True)["model"]
    state = model.model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in state.items())
    words = AutoTokenizer.from_pretrained(config.output / "student")
    assert model.words.context == words.model_max_length == CONTEXT
    processor = AutoProcessor.from_pretrained(config.output / "student")
    assert processor(text=["red circle"])["input_ids"] == model.words.encode(["red circle"])[0].tolist()
    assert words("red circle")["input_ids"] == model.words.tokenizer("red circle")["input_ids"]
    image = next((scenes / "images" / "val").iterdir())
    found = predict(image, config.output / "student", "red circle", threshold=0.0, out=tmp_path / "seen.png")
    assert len(found) == 4 and (tmp_path / "seen.png").is_file()


def test_a_finished_run_is_left_alone_and_another_over_it_is_refused(
    walked: tuple[DetectionRunConfig, RunResult],
) -> None:
    config, _ = walked
    assert train(config).images_per_second == 0
    with pytest.raises(UserError, match=r"train\.phases"):
        train(config.model_copy(update={"train": config.train.model_copy(update={"phases": None})}))


def test_what_cannot_work_is_one_line(
    refused, detection: Recipe, tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "default_device", lambda: torch.device("cpu"))
    path = written(detection(tmp_path / "run"), tmp_path / "run.yaml")
    assert "nothing to cache" in refused(["cache", path])
    for verb in ("plan", "check", "train"):
        assert "answers no questions in words" in refused([verb, path, f"teacher.path={tracker[1]}"])
        assert "unknown key 'match.flor'; did you mean 'floor'?" in refused([verb, path, "match.flor=0.1"])
    assert "16 images are less than one batch" in refused(["plan", path, "train.batch_size=17"])
    assert "questions.boxes=0" in refused(["train", path, "train.precision=bf16"])
    late = "train.phases=[{name: late, epochs: 1, lr: 1e-3, warmup_steps: 4}]"
    assert "phase 'late' has 4 steps" in refused(["train", path, late])
    assert not (tmp_path / "run").exists()


def test_without_masks_and_names_nothing_is_measured(detection: Recipe, scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "scenes", ignore=shutil.ignore_patterns("concepts_*.json"))
    config = detection(tmp_path / "run", f"data.root={tmp_path / 'scenes'}")
    (tmp_path / "bare").mkdir()
    for image in (scenes / "images" / "val").iterdir():
        shutil.copy(image, tmp_path / "bare")
    settings = {"root": tmp_path / "bare", "kind": "folder", "held_out": 0.5}
    bare = config.model_copy(update={"data": config.data.model_copy(update=settings)})
    job = detection_job.DetectionJob()
    assert job.evaluate(bare, None) is None and "evaluate.concepts" in job.unmeasured


def test_without_a_file_of_concepts_the_labels_are_asked(
    walked: tuple[DetectionRunConfig, RunResult], scenes: Path, tmp_path: Path
) -> None:
    shutil.copytree(scenes, tmp_path / "scenes", ignore=shutil.ignore_patterns("concepts_*.json"))
    config, _ = walked
    moved = config.model_copy(update={"data": config.data.model_copy(update={"root": tmp_path / "scenes"})})
    evaluated = detection_job.DetectionJob().evaluate(moved, None)
    assert evaluated is not None
    assert [row.name for row in evaluated.result.rows] == ["teacher", "untrained", "distilled"]
    assert evaluated.result.images == 4 and 0 < evaluated.result.positives < evaluated.result.questions
