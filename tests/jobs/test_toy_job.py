"""A job is a package and a row in ``JOBS``: one that the package has never heard of runs through everything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from samdistill.cli import main
from samdistill.jobs import JOBS
from samdistill.jobs.loading import load_config
from samdistill.store import FeatureStore
from samdistill.types import UserError

RECIPE = """
job: toy
data: {kind: sa1b, root: nowhere, workers: 0}
train: {batch_size: 4, epochs: 100, lr: 0.1, warmup_epochs: 1, lr_batch: null, precision: fp32}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of its demo, with its recipe in it."""
    monkeypatch.setattr(JOBS, "_places", dict(JOBS._places))
    monkeypatch.setattr(JOBS, "_jobs", dict(JOBS._jobs))
    JOBS.register("toy", "toy_job:ToyJob")
    (tmp_path / "toy.yaml").write_text(RECIPE)
    yield tmp_path


def test_a_registered_job_runs_through_every_verb(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--job", "toy", "--out", str(toy)]) == 0
    said, run = capsys.readouterr().out, toy / "run"
    assert all(stage in said for stage in ("plan", "cache", "check", "train", "evaluate", "squared error", "a note"))
    errors = json.loads((run / "evaluation.json").read_text())
    assert errors["distilled"] < 0.1 * errors["untrained"]
    page = (run / "report.html").read_text()
    assert "Colours of a toy" in page and "squared error" in page and "cached colours" in page.lower()
    store = FeatureStore(run / "colours")
    assert len(store) == 8

    words = [str(toy / "toy.yaml"), f"data.root={toy / 'data'}", f"output={run}"]
    for verb in ("plan", "check", "cache", "train"):
        assert main([verb, *words, *(["--verify"] if verb == "cache" else [])]) == 0, verb
    said = capsys.readouterr().out
    assert "images  8" in said and "squared" in said and "8 records (0 new)" in said and "8 records recomputed" in said
    other = [f"output={toy / 'other'}", *words[:2]]
    assert main(["check", *[words[0], *other[::2]]]) == 0  # without a cache: the teacher runs
    assert not (toy / "other").exists()
    assert main(["train", words[0], words[1], other[0], "cache.mode=online"]) == 0
    ends = [load_file(toy / name / "student" / "model.safetensors") for name in ("run", "other")]
    for name, value in ends[0].items():  # but for what float16 rounds
        assert (value - ends[1][name]).abs().max() < 1e-2


def test_its_terms_are_the_keys_of_its_config(toy: Path) -> None:
    words = [f"data.root={toy}", "train.phases=[{name: one, epochs: 1, lr: 1e-3, terms: [squared]}]"]
    config = load_config(toy / "toy.yaml", [*words, "loss.squared=0.5"])
    assert config.loss.weight("squared") == 0.5 and config.term_names() == ("squared",)
    with pytest.raises(UserError, match=r"unknown key 'loss\.square'; did you mean 'squared'"):
        load_config(toy / "toy.yaml", [*words, "loss.square=0.5"])
    with pytest.raises(UserError, match=r"phase 'one' has no term with a weight; set loss\.squared above 0"):
        load_config(toy / "toy.yaml", [*words, "loss.squared=0"])
    with pytest.raises(UserError, match="unknown term 'cubed'"):
        load_config(toy / "toy.yaml", ["train.phases=[{name: one, epochs: 1, lr: 1e-3, terms: [cubed]}]"])


def test_a_job_is_registered_once_and_a_typo_gets_a_suggestion(toy: Path) -> None:
    with pytest.raises(ValueError, match="registered twice"):
        JOBS.register("toy", "toy_job:ToyJob")
    with pytest.raises(UserError, match="did you mean 'toy'"):
        JOBS["toi"]
