"""The whole road, small: what it leaves behind, and that a second call only finds it there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from samdistill import pipeline
from samdistill.checkpoints.promptable import load_promptable
from samdistill.engine import fit as engine_fit
from samdistill.jobs.encoder.config import EncoderRunConfig
from samdistill.pipeline import RunResult, run, run_pipeline
from samdistill.types import UserError


@pytest.fixture(scope="module")
def walked(recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderRunConfig, RunResult]:
    config = recipe(tmp_path_factory.mktemp("road"))
    return config, run_pipeline(config)


def test_it_leaves_a_student_a_merged_model_figures_and_a_report(walked: tuple[EncoderRunConfig, RunResult]) -> None:
    config, result = walked
    out = config.output
    assert result.cached.records == 24 and result.trained.steps == 6 and result.checked.ok
    figures = json.loads((out / "evaluation.json").read_text())
    assert [row["name"] for row in figures["models"]] == ["teacher", "untrained", "distilled"]
    assert figures["images"] == 8 and figures["labelled"]
    teacher, untrained, distilled = figures["models"]
    assert teacher["kept"] == {} or set(teacher["kept"].values()) == {1.0}
    assert set(distilled["kept"]) == {"box", "point", "refine"}
    assert distilled["mse"] < untrained["mse"] and distilled["cosine"] > untrained["cosine"]
    assert distilled["trunk_parameters"] == untrained["trunk_parameters"] < teacher["trunk_parameters"]
    page = (out / "report.html").read_text()
    assert result.report == out / "report.html" and page.count("data:image") > 6
    assert "es_ev_s" in page and "report:" in result.summary()


def test_the_merged_model_runs_the_trained_trunk(walked: tuple[EncoderRunConfig, RunResult]) -> None:
    config, result = walked
    assert result.merged is not None and Path(result.merged.out) == config.output / "merged"
    model = load_promptable(config.output / "merged")
    saved = torch.load(result.trained.checkpoint, weights_only=True)["model"]
    state = model.vision_encoder.backbone.state_dict()
    assert set(state) == set(saved) and all(torch.equal(state[name], saved[name]) for name in saved)


def test_a_second_call_trains_nothing_and_succeeds(
    walked: tuple[EncoderRunConfig, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, first = walked
    kept = [first.trained.checkpoint, config.output / "student" / "model.safetensors"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    records = {path: path.read_bytes() for path in config.store_root.iterdir()}
    resumed: list[object] = []
    monkeypatch.setattr(
        pipeline, "fit", lambda *args, **options: resumed.append(options["resume"]) or engine_fit(*args, **options)
    )
    again = run_pipeline(config)
    assert resumed == [None] and again.cached.written == 0 and again.trained.images_per_second == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert {path: path.read_bytes() for path in config.store_root.iterdir()} == records
    assert again.trained.terms == first.trained.terms
    assert again.evaluated is not None and first.evaluated is not None
    assert again.evaluated.result.row("distilled").miou == first.evaluated.result.row("distilled").miou


def test_a_folder_of_photographs_needs_no_labels(world: Path, tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    shutil.copytree(world / "images" / "train", photographs)
    (photographs / "broken.jpg").write_bytes(b"no image")
    settings = ["train.epochs=1", "train.warmup_epochs=0.2", "data.workers=0", "evaluate.prompts=[box]"]
    result = run(photographs, "sandbox", "es_ev_s", tmp_path / "out", overrides=settings)
    train, held_out = result.cached.records, result.evaluated.result
    assert held_out is not None and not held_out.labelled and held_out.images > 0
    skipped = len(result.cached.skipped) + len(held_out.skipped)
    assert train + held_out.images == 24 and skipped == 1  # every input is used once or listed
    assert set(held_out.row("distilled").agreement) == {"box"} and "mean IoU" in result.summary()
    assert result.config.train.batch_size * 4 <= train + 1 and result.config.train.batch_size >= 2
    page = result.report.read_text()
    assert "broken.jpg" in page


def test_a_folder_with_too_few_images_is_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    for path in sorted((world / "images" / "train").iterdir())[:2]:
        shutil.copy(path, tmp_path / "few")
    with pytest.raises(UserError, match="give at least three"):
        run(tmp_path / "few", "sandbox", "es_ev_s", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_less_than_one_batch_is_refused_before_anything_is_spent(recipe, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "train.batch_size=64")
    with pytest.raises(UserError, match="24 images are less than one batch"):
        run_pipeline(config)
    assert not config.store_root.exists()
