"""The example in the docstring of each public name, run as it stands."""

from __future__ import annotations

import doctest
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import samdistill
from samdistill.checkpoints.files import locate
from samdistill.checkpoints.student import load_with_memory
from samdistill.checkpoints.words import Words
from samdistill.sandbox.videos import VideoStyle
from samdistill.sandbox.write import write_sa1b
from samdistill.sandbox.write_videos import write_sav
from samdistill.students import StudentTrunkConfig, build_trunk

LONG = {"demo", "distill", "export", "run"}
"""Whole pipelines. ``tests/jobs`` and ``tests/deployment`` run them with settings that take seconds."""
ELSEWHERE = {"cache": "train", "check": "train"}
"""Names whose example is part of another name's."""
NAMES = sorted(set(samdistill.__all__) - {"UserError", "__version__"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the examples name."""
    root = tmp_path_factory.mktemp("examples")
    samdistill.render_sandbox(root / "data" / "coco", train=1, val=2, format="coco", progress=False)
    shutil.copytree(root / "data" / "coco" / "images" / "val", root / "photos")
    shutil.copy(next((root / "photos").glob("*.jpg")), root / "photo.jpg")
    (video,) = write_sav(root / "data" / "sav", 1, 126, 3, "val", VideoStyle(frames=9))
    shutil.copy(root / "data" / "sav" / "val" / f"{video}.mp4", root / "film.mp4")
    write_sa1b(root / "downloads", 2, 96, seed=1)
    for masks in ("DAVIS/Annotations", "predictions"):
        write_masks(root / masks / "bear")
    image = locate("sandbox-student")
    shutil.copytree(image, root / "runs" / "words" / "student")
    video_student = load_with_memory(image, latents=12, layers=1, windows=2)
    video_student.config.memory_level = 2
    video_student.save_pretrained(root / "runs" / "video" / "student")
    Words.load(image, video_student.config.text_config.vocab_size).save(root / "runs" / "video" / "student")
    build_trunk(StudentTrunkConfig(backbone="es_ev_s", hidden_size=192, image_size=126)).save_pretrained(
        root / "runs" / "mine" / "student"
    )
    return root


def write_masks(folder: Path) -> None:
    folder.mkdir(parents=True)
    for frame in range(4):
        ids = np.zeros((20, 20), np.uint8)
        ids[4:12, 4 + frame : 12 + frame] = 1
        Image.fromarray(ids).save(folder / f"{frame:05}.png")


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_gives_what_it_shows(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ELSEWHERE:
        assert f"sd.{name}(" in (getattr(samdistill, ELSEWHERE[name]).__doc__ or "")
        return
    finder = doctest.DocTestFinder(recurse=False)
    scope = {"samdistill": samdistill, "torch": torch, name: getattr(samdistill, name)}
    (test,) = (found for found in finder.find(getattr(samdistill, name), name, globs=scope) if found.examples)
    skipped = [example for example in test.examples if doctest.SKIP in example.options]
    assert not skipped or name in LONG
    monkeypatch.chdir(folder)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
