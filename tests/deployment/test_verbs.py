"""``--export`` and ``--web`` of the verbs that run a whole job: what reaches the export, with nothing exported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from samdistill import pipeline
from samdistill.cli import main
from samdistill.delivery import Delivery
from samdistill.deployment import folder, page
from samdistill.jobs import JOBS
from samdistill.types import UserError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """What ``export``, ``run_pipeline`` and ``serve_page`` were asked; none of them does anything."""
    found: list = []
    result = SimpleNamespace(summary=lambda: "done", exported=SimpleNamespace(folder=Path("exported")))
    monkeypatch.setattr(page, "find_runtime", lambda *_: Path("ort"))
    monkeypatch.setattr(page, "serve_page", lambda folder, say: found.append(("serve", folder)))
    monkeypatch.setattr(type(JOBS["prompt"]), "demo", lambda job, folder: ("recipe", []))
    monkeypatch.setattr(pipeline, "run_pipeline", lambda config, given: found.append(given) or result)
    return found


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], [Delivery()]),
        (["--export", "onnx"], [Delivery(("onnx",))]),
        (["--web"], [Delivery(("onnx",), True), ("serve", Path("exported"))]),
        (["--export", "onnx", "--web"], [Delivery(("onnx",), True), ("serve", Path("exported"))]),
    ],
)
def test_the_demo_exports_and_serves(
    asked: list, arguments: list[str], given: list, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(pipeline, "load_config", lambda *_: None)
    assert main(["demo", "--job", "prompt", "--out", str(tmp_path), *arguments]) == 0
    assert asked == given and "done" in capsys.readouterr().out


@pytest.mark.parametrize("job", ["detection", "video"])
def test_the_page_of_a_detector_in_the_demo_has_the_phrases_of_its_data(asked: list, job: str, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_config", lambda *_: None)
    monkeypatch.setattr(type(JOBS[job]), "demo", lambda *_: ("recipe", []))
    pipeline.demo(tmp_path, job, web=True)
    assert "red circle" in asked[0].vocabulary and asked[0].targets == ("onnx",)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["--export", "onnx"], Delivery(("onnx",))),
        (["--web"], Delivery(("onnx",), True)),
        (["--export", "onnx", "--vocabulary", "star"], Delivery(("onnx",), False, "star")),
    ],
)
def test_run_and_distill_pass_on_what_is_exported(
    asked: list, arguments: list[str], given: Delivery, world: Path, tmp_path: Path
) -> None:
    own = ["run", str(world), "--teacher", "sandbox", "--student", "es_rv_s", "--out", str(tmp_path / "run")]
    assert main([*own, *arguments]) == 0
    assert asked == [given]


@pytest.mark.parametrize("web", [False, True])
def test_the_last_stage_exports_what_the_run_made(web: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list = []
    made = SimpleNamespace(table=lambda: "table")
    monkeypatch.setattr(folder, "export", lambda model, out, **options: given.append((model, out, options)) or made)
    config, delivery = SimpleNamespace(output=tmp_path), Delivery(("onnx",), web, ("star",))
    assert delivery.export(config, None) is made
    assert delivery.export(config, SimpleNamespace(out=tmp_path / "merged")) is made
    options = {"to": ("onnx",), "web": web, "vocabulary": ("star",)}
    assert given == [(tmp_path, tmp_path / "export", options), (tmp_path / "merged", tmp_path / "export", options)]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--job", "detection", "--web"], "--vocabulary"),
        (["--job", "detection", "--vocabulary", "star"], "add --export onnx"),
        (["--job", "detection", "--export", "onnx", "--vocabulary", ""], "--vocabulary: no phrase given"),
    ],
)
def test_words_that_are_missing_or_of_no_use_are_said_before_anything_is_loaded(
    asked: list, arguments: list[str], line: str, world: Path, tmp_path: Path, capsys
) -> None:
    assert main(["run", str(world), "--teacher", "sandbox", "--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert line in error and "\n" not in error and asked == [] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "phrase", "line"),
    [
        ("detection/sandbox", "xyzzy", "does not know the word 'xyzzy'"),
        ("detection/hosted_sandbox", "star,star", "'star' is given twice"),
        ("text/sandbox", "red xyzzy", "does not know the word 'xyzzy'"),
        ("encoder/sandbox", "star", "this encoder run makes a model without phrases"),
    ],
)
def test_words_that_the_finished_model_would_not_know_are_said_before_anything_is_spent(
    recipe: str, phrase: str, line: str, scenes: Path, tmp_path: Path, monkeypatch
) -> None:
    def spent(*_: object) -> None:
        raise AssertionError("a stage ran")

    for stage in ("cache", "check", "train"):
        monkeypatch.setattr(pipeline, stage, spent)
    data = [] if recipe.startswith("text") else ["data.kind=coco", f"data.root={scenes}", "train.batch_size=4"]
    config = pipeline.load_config(recipe, [f"output={tmp_path / 'run'}", *data])
    with pytest.raises(UserError, match=line):
        pipeline.run_pipeline(config, Delivery(("onnx",), False, phrase))
    with pytest.raises(AssertionError, match="a stage ran"):  # the phrases are the only obstacle
        pipeline.run_pipeline(config, Delivery(("onnx",), False, "" if recipe.startswith("encoder") else "star"))


@pytest.mark.parametrize(
    ("model", "options", "line"),
    [("sandbox-mobile", {"to": "openvino"}, "ONNX"), ("sandbox-student", {}, "--vocabulary")],
)
def test_a_page_that_could_not_answer_is_refused(model, options, line, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folder, "find_runtime", lambda: None)
    monkeypatch.setattr(folder, "target", lambda name: SimpleNamespace(precisions=("fp32",)))
    with pytest.raises(UserError, match=line):
        folder.export(model, tmp_path / "out", web=True, **options)


@pytest.mark.parametrize("arguments", [["--export", "onxx"], ["--web"]])
def test_what_is_missing_is_said_before_anything_is_rendered(arguments, monkeypatch, tmp_path: Path, capsys) -> None:
    def missing(*_):
        raise UserError("--web needs the npm package")

    monkeypatch.setattr(page, "find_runtime", missing)
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert ("did you mean 'onnx'" in error or "npm package" in error) and "\n" not in error
    assert not (tmp_path / "out").exists()
