"""``--web`` of whole runs, with real conversions. test_verbs.py has what reaches the export, without any."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import samdistill as sd
from samdistill.cli import main
from samdistill.deployment.page import RUNTIME
from samdistill.jobs.detection import job as detection_job
from samdistill.pipeline import demo, distill

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder has the npm package of the page."""
    dist = tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for name in RUNTIME:
        (dist / name).write_text(name)
    monkeypatch.chdir(tmp_path)


def test_a_run_is_exported_with_its_page_and_answers_alike(world: Path, tmp_path: Path) -> None:
    settings = ["train.batch_size=8", "train.epochs=1", "data.workers=0"]
    own = ["--teacher", "sandbox", "--student", "es_ev_s", "--out", str(tmp_path / "run")]
    assert main(["run", str(world), *settings, *own, "--web"]) == 0
    image = next(world.rglob("*.jpg"))
    merged, exported = (sd.load(tmp_path / "run" / name)(image, points=[(60, 60, 1)]) for name in ("merged", "export"))
    torch.testing.assert_close(exported.masks, merged.masks)
    again = distill(
        "encoder", world, teacher="sandbox", student="es_ev_s", out=tmp_path / "run",
        train={"batch_size": 8, "epochs": 1}, overrides=["data.workers=0"], export=["onnx"],
    )  # fmt: skip
    assert again.exported is not None and again.exported.passed
    assert not (tmp_path / "run/export/index.html").exists()


def test_the_demo_of_a_detector_has_a_page_with_the_words_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        detection_job, "render_sandbox", partial(detection_job.render_sandbox, train=16, val=4, size=126)
    )
    phases = "train.phases=[{name: align, epochs: 1, lr: 1e-3}]"
    found = demo(
        tmp_path / "demo", "detection", overrides=[phases, "train.batch_size=8", "data.workers=0"], web=True
    ).exported  # fmt: skip
    assert found is not None and found.passed and (found.folder / "index.html").is_file()
    words = json.loads((found.folder / "vocabulary.json").read_text())["phrases"]
    assert "red circle" in words
    assert sd.load(found.folder)(next((tmp_path / "demo/data").rglob("*.jpg")), "red circle") is not None
