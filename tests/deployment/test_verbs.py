"""``--export`` and ``--web`` of the verbs that run a whole job: what reaches the export, with nothing exported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from samdistill import pipeline
from samdistill.cli import main
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
    monkeypatch.setattr(pipeline, "run_pipeline", lambda config, *given: found.append(given) or result)
    return found


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], [([], False)]),
        (["--export", "onnx"], [(["onnx"], False)]),
        (["--web"], [(["onnx"], True), ("serve", Path("exported"))]),
        (["--export", "onnx", "--web"], [(["onnx"], True), ("serve", Path("exported"))]),
    ],
)
def test_the_demo_exports_and_serves(
    asked: list, arguments: list[str], given: list, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(pipeline, "load_config", lambda *_: None)
    assert main(["demo", "--job", "prompt", "--out", str(tmp_path), *arguments]) == 0
    assert asked == given and "done" in capsys.readouterr().out


def test_run_and_distill_pass_the_targets_on(asked: list, world: Path, tmp_path: Path) -> None:
    arguments = ["run", str(world), "--teacher", "sandbox", "--student", "es_rv_s", "--out", str(tmp_path / "run")]
    assert main([*arguments, "--export", "onnx"]) == 0
    assert asked == [(["onnx"],)]


@pytest.mark.parametrize("web", [False, True])
def test_the_last_stage_exports_what_the_run_made(web: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list = []
    made = SimpleNamespace(table=lambda: "table")
    monkeypatch.setattr(folder, "export", lambda model, out, **options: given.append((model, out, options)) or made)
    config = SimpleNamespace(output=tmp_path)
    assert pipeline._export(config, None, ["onnx"], web) is made
    assert pipeline._export(config, SimpleNamespace(out=tmp_path / "merged"), ["onnx"], web) is made
    options = {"to": ["onnx"], "web": web}
    assert given == [(tmp_path, tmp_path / "export", options), (tmp_path / "merged", tmp_path / "export", options)]


@pytest.mark.parametrize("arguments", [["--export", "onxx"], ["--web"]])
def test_what_is_missing_is_said_before_anything_is_rendered(arguments, monkeypatch, tmp_path: Path, capsys) -> None:
    def missing(*_):
        raise UserError("--web needs the npm package")

    monkeypatch.setattr(page, "find_runtime", missing)
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert ("did you mean 'onnx'" in error or "npm package" in error) and "\n" not in error
    assert not (tmp_path / "out").exists()
