"""The whole prompt road: what it measures, what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samdistill import pipeline
from samdistill.cli import main
from samdistill.jobs.base import DISTILLED, TEACHER
from samdistill.jobs.loading import load_config
from samdistill.jobs.prompt import job as prompt_job
from samdistill.jobs.prompt.evaluate import UNTUNED, evaluate
from samdistill.pipeline import demo, run_pipeline

CACHED = "distillation.use_precomputed_features=true"


def test_a_cached_run_goes_the_whole_way_and_is_not_trained_twice(prompted, tmp_path) -> None:
    config = prompted(tmp_path, CACHED, "data.fraction=0.3", "train.epochs=1", "evaluate.images=2")
    road = run_pipeline(config)
    assert [row.name for row in road.evaluated.result.rows] == [TEACHER, UNTUNED, DISTILLED]
    assert road.evaluated.result.teacher == TEACHER and road.evaluated.result.labelled
    tuned, start = road.evaluated.result.row(DISTILLED), road.evaluated.result.row(UNTUNED)
    assert tuned.parameters == start.parameters and set(tuned.miou) == {"box", "point", "refine"}
    assert f"box: mIoU {tuned.miou['box']:.3f} (untuned {start.miou['box']:.3f}, its teacher" in road.summary()
    page = road.report.read_text()
    assert "; untuned, it keeps" in page and "untrained" not in page and "encoder_patch/large" in page
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["name"] for row in saved["models"]] == [TEACHER, UNTUNED, DISTILLED]
    again = run_pipeline(config)
    assert again.trained.images_per_second == 0 and again.evaluated.result.row(DISTILLED).miou == tuned.miou


def test_a_teacher_of_another_size_is_left_out_of_the_table(prompted, tmp_path, capsys) -> None:
    settings = ("data.fraction=0.3", "train.epochs=1", "evaluate.images=2", "evaluate.prompts=[box]")
    road = run_pipeline(prompted(tmp_path, "teachers=[]", "distillation.enable=false", *settings))
    assert [row.name for row in road.evaluated.result.rows] == [
        UNTUNED,
        DISTILLED,
    ] and "its teacher" not in road.summary()
    capsys.readouterr()
    larger = prompted(tmp_path, 'teachers=[{"name": "sam3", "checkpoint": "sandbox"}]', *settings)
    assert [row.name for row in evaluate(larger).rows] == [UNTUNED, DISTILLED]
    assert "without the teacher sam3: it reads images of 126 px" in capsys.readouterr().out


def test_the_demo_is_the_sandbox_recipe_on_scenes_of_its_own(tmp_path, monkeypatch, capsys) -> None:
    asked = {}

    def walked(config, delivery):
        asked["config"] = config
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_pipeline", walked)
    monkeypatch.setattr(prompt_job, "SCENES", {"train": 3, "val": 2})
    assert main(["demo", "--job", "prompt", "--out", str(tmp_path)]) == 130
    config = asked["config"]
    recipe = load_config("prompt/sandbox")
    assert config.output == tmp_path / "run" and config.data.root == tmp_path / "data"
    assert (config.student, config.teachers, config.train) == (recipe.student, recipe.teachers, recipe.train)
    found = json.loads((tmp_path / "data" / "annotations" / "instances_train.json").read_text())
    assert len(found["images"]) == 3 and len(found["annotations"]) >= 3 * prompt_job.WORLD.min_objects - 2
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path, "prompt", overrides=["train.epochs=1"])
    assert asked["config"].train.epochs == 1 and isinstance(asked["config"].output, Path)
