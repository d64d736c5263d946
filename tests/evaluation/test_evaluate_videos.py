"""Evaluation of videos as a verb: which data it recognises, whose rules it takes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samdistill.checkpoints.student import load_with_memory
from samdistill.data.layouts import video_kind
from samdistill.evaluation.evaluate_videos import evaluate_videos, held_out_videos
from samdistill.evaluation.video_result import STUDENT, TEACHER, WITHOUT
from samdistill.inference import video as session_module
from samdistill.inference.tracks import Ring
from samdistill.metrics.video_frames import DAVIS_2017, SAV
from samdistill.sandbox.concepts import VOCABULARY, sandbox_words
from samdistill.sandbox.videos import VideoStyle
from samdistill.sandbox.write_videos import write_sav
from samdistill.students import EfficientSam3Model, efficient_sam3_config
from samdistill.types import UserError

TEXT = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "projection_dim": 32}  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One training video and three held-out ones. Read only."""
    root, style = tmp_path_factory.mktemp("videos"), VideoStyle(frames=24)
    write_sav(root, 1, (40, 56), seed=1, split="train", style=style)
    write_sav(root, 3, (40, 56), seed=2, split="val", style=style)
    return root


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random student of images, and a run with it and a memory."""
    torch.manual_seed(0)
    image, run = tmp_path_factory.mktemp("image"), tmp_path_factory.mktemp("run")
    model = EfficientSam3Model(efficient_sam3_config("efficientvit_b0", 126, 32, 2, 64, 1, 1, 5, TEXT))
    model.save_pretrained(image)
    sandbox_words().save(image)
    load_with_memory(image, latents=8, layers=1).save_pretrained(run / "student")
    sandbox_words().save(run / "student")
    return image, run


def frames(folder: Path, *names: str, masks: str = "Annotations", images: str = "JPEGImages") -> Path:
    """Videos of three frames as folders, with a square of the id 1."""
    grid = np.zeros((20, 30), np.uint8)
    grid[5:12, 5:12] = 1
    for name in names:
        for part in (images, masks):
            (folder / part / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (30, 20), (9 * number, 0, 0)).save(folder / images / name / f"{number:05}.jpg")
            Image.fromarray(grid).save(folder / masks / name / f"{number:05}.png")
    return folder


def test_layouts_are_recognised(videos: Path, tmp_path: Path, world: Path) -> None:
    assert video_kind(videos) == video_kind(videos / "val") == "sav"
    assert video_kind(world) is video_kind(tmp_path / "nowhere") is None
    assert video_kind(frames(tmp_path / "davis", "bear", "train")) == "davis"
    assert video_kind(frames(tmp_path / "pascal")) is None
    assert video_kind(frames(tmp_path / "images", "train", "val")) is None  # parts of a set of images
    assert video_kind(frames(tmp_path / "parts" / "val", "bear").parent) == "davis"
    (tmp_path / "packed").mkdir()
    shutil.copytree(videos / "val", tmp_path / "packed" / "sav_000")
    assert video_kind(tmp_path / "packed") == "sav"
    for path in (tmp_path / "packed" / "sav_000").glob("*.json"):
        path.unlink()
    assert video_kind(tmp_path / "packed") is None  # videos without masks


def test_the_held_out_part_and_its_rules(videos: Path, tmp_path: Path) -> None:
    source, rules = held_out_videos(videos)
    assert [key[:5] for key in source.keys] == ["sav_2"] * 3 and rules is SAV
    source, rules = held_out_videos(videos / "train")
    assert len(source.keys) == 1 and rules is SAV
    davis = frames(tmp_path / "davis", "bear", "camel", "dog")
    source, rules = held_out_videos(davis)
    assert source.keys == ["bear", "camel", "dog"] and rules is DAVIS_2017
    (davis / "ImageSets" / "2017").mkdir(parents=True)
    (davis / "ImageSets" / "2017" / "val.txt").write_text("dog\nbear\n")
    assert held_out_videos(davis)[0].keys == ["bear", "dog"]
    sav = frames(tmp_path / "sav", "sav_000001", images="JPEGImages_24fps", masks="Annotations_6fps")
    source, rules = held_out_videos(sav)
    assert source.keys == ["sav_000001"] and rules is SAV
    parts = tmp_path / "parts"
    frames(parts / "train", "bear")
    frames(parts / "val", "dog")
    assert held_out_videos(parts)[0].keys == ["dog"]
    with pytest.raises(UserError, match="no videos with masks here"):
        held_out_videos(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        held_out_videos(tmp_path / "nowhere")


def test_a_student_with_its_memory_without_it_and_with_its_teacher(
    videos: Path, students: tuple[Path, Path], detector: tuple[object, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered: dict[int, list[tuple[int, torch.Tensor]]] = {}

    class Spied(Ring):
        def add(self, number: int, features: torch.Tensor, marks: object) -> None:
            remembered.setdefault(id(self), []).append((number, features))
            kept.append(self)
            super().add(number, features, marks)  # type: ignore[arg-type]

    kept: list[Ring] = []  # so that no id is given twice
    monkeypatch.setattr(session_module, "Ring", Spied)
    result = evaluate_videos(students[1], videos, teacher=str(detector[1]), videos=2, progress=False)
    assert result.names == [WITHOUT, STUDENT, TEACHER] and result.videos == 2 and result.convention == "sav"
    assert all(0 <= row.jf <= 1 and row.latency_ms > 0 for row in result.rows)
    assert result.row(TEACHER).kept is None and {row.objects for row in result.rows} == {result.rows[0].objects}
    own, theirs = list(remembered.values())[::2], list(remembered.values())[1::2]
    assert len(own) == len(theirs) == 2
    for one, other in zip(own, theirs, strict=True):  # the same frames, every one by its other map
        assert [n for n, _ in one] == [n for n, _ in other] == list(range(len(one)))
        assert all(not torch.equal(mine, maps) for (_, mine), (_, maps) in zip(one, other, strict=True))
    json.dumps(result.to_dict())


def test_data_of_every_frame_is_remembered_at_the_models_stride(
    students: tuple[Path, Path], detector: tuple[object, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No frame is remembered by the student's own map where the teacher's is to be."""
    sources: list[bool] = []
    remember = session_module.VideoSession._remember

    def spy(self: object, now: object, remembered: torch.Tensor | None) -> None:
        sources.append(remembered is not None)
        remember(self, now, remembered)  # type: ignore[arg-type]

    monkeypatch.setattr(session_module.VideoSession, "_remember", spy)
    root = frames(tmp_path, "bear")
    grid = np.zeros((20, 30), np.uint8)
    for number in range(8):
        grid[5:12, 5:12], grid[14:19, 14:19] = 1, 2 * (number > 1)
        Image.new("RGB", (30, 20), (9 * number, 0, 0)).save(root / "JPEGImages" / "bear" / f"{number:05}.jpg")
        Image.fromarray(grid).save(root / "Annotations" / "bear" / f"{number:05}.png")
    for every in (False, True):
        sources.clear()
        result = evaluate_videos(
            students[1], root, teacher=str(detector[1]), convention="sav", every_frame=every, progress=False
        )
        assert result.convention == "sav" and result.row(STUDENT).objects == 2
        assert sources == [False, True] * 3  # frames 0, 2 (the second object comes) and 4, in either session


def test_what_cannot_be_measured_is_refused(
    videos: Path, students: tuple[Path, Path], detector: tuple[object, Path], tmp_path: Path
) -> None:
    image, run = students
    for model in (image, detector[1]):
        with pytest.raises(UserError, match="this model has no video memory; give a run of the video job"):
            evaluate_videos(model, videos, progress=False)
    with pytest.raises(UserError, match="no convention is called 'davis2016'; did you mean 'davis2017'"):
        evaluate_videos(run, videos, convention="davis2016", progress=False)
    with pytest.raises(UserError, match="unknown geometry 'round'"):
        evaluate_videos(run, videos, geometry="round", progress=False)
    with pytest.raises(UserError, match="--videos must be at least 1, got 0"):
        evaluate_videos(run, videos, videos=0, progress=False)
    with pytest.raises(UserError, match="--workers must be at least 1, got 0"):
        evaluate_videos(run, videos, workers=0, progress=False)
    with pytest.raises(UserError, match=r"--teacher: .* is a student"):
        evaluate_videos(run, videos, teacher=str(image), progress=False)
    with pytest.raises(UserError, match="no videos with masks here"):
        evaluate_videos(run, tmp_path, progress=False)
