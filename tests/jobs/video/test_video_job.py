"""The video job as a user runs it: plan, cache, check, train, evaluate, predict, demo, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_video import ALIGNED, CONTEXT_FRAMES, WIDTH, VideoRecipe
from transformers import AutoProcessor

import samdistill
from samdistill import pipeline
from samdistill.checkpoints.student import load_with_memory
from samdistill.cli import main
from samdistill.config import packaged
from samdistill.delivery import Delivery
from samdistill.engine import fit as engine_fit
from samdistill.evaluation.clips import evaluate_clips
from samdistill.evaluation.video_pictures import Answers
from samdistill.evaluation.video_result import STUDENT, TEACHER, WITHOUT
from samdistill.inference.concepts import StudentDetector, load_concept_model
from samdistill.jobs.caching import open_stores
from samdistill.jobs.loading import load_config
from samdistill.jobs.video import job as video_job
from samdistill.jobs.video import parts as video_parts
from samdistill.jobs.video.config import VideoRunConfig
from samdistill.metrics.video import region_similarity
from samdistill.pipeline import RunResult, check, demo, plan, run_pipeline, train
from samdistill.teachers import RunningFrames, Sam3Detector, StoredMaps, describe_detector
from samdistill.types import UserError

RECIPES = [name for name in packaged() if name.startswith("video/")]
SHORT = (
    "train.phases=[{name: memory, epochs: 2, lr: 1e-2, terms: [mask, box_l1, giou, iou, presence, select]}]",
    "clips.per_video=1",
)
"""Two steps."""


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """Every teacher is read once: nearly all runs here are of the same."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(video_parts, "Sam3Detector", lru_cache(Sam3Detector))
        patched.setattr(video_parts, "describe_detector", lru_cache(describe_detector))
        yield


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """refused(argv): the one line of a command that must end as a user's error."""

    def run(argv: list[str]) -> str:
        capsys.readouterr()
        assert main(argv) == 2
        text = capsys.readouterr().err
        assert text.splitlines()[-1].startswith(f"samdistill {argv[0]}: ") and "Traceback" not in text, text
        assert [line.startswith("samdistill") for line in text.splitlines()].count(True) == 1
        return text

    return run


def written(config: VideoRunConfig, path: Path) -> str:
    path.write_text(config.to_yaml())
    return str(path)


@pytest.fixture(scope="module")
def walked(video: VideoRecipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[VideoRunConfig, RunResult]:
    """The whole road: two epochs over four videos, measured on two."""
    config = video(tmp_path_factory.mktemp("road") / "run", *SHORT, "evaluate.videos=1")
    return config, run_pipeline(config)


@pytest.fixture(scope="module")
def maps(walked: tuple[VideoRunConfig, RunResult]) -> str:
    """The setting of a cache that is there."""
    return f"cache.root={walked[0].store_root}"


def film(source: Path) -> list:
    with av.open(str(source)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.video[0])]


def test_the_road_leaves_figures_a_film_and_a_report(walked: tuple[VideoRunConfig, RunResult], films: Path) -> None:
    config, road = walked
    assert road.checked.ok and road.cached.records == 24 and (road.trained.steps, road.trained.epochs) == (2, 2)
    found = road.evaluated.result
    assert found.names == [WITHOUT, STUDENT, TEACHER] and found.videos == 1 and set(found.clips) == set(found.names)
    keys = sorted(path.stem for path in (films / "val").glob("*.mp4"))
    for scores in found.clips.values():  # all of them, four frames of each, the same questions
        assert sorted({answer.key for answer in scores.answers}) == keys
        assert len({(a.key, a.frame) for a in scores.answers}) <= 8
    questions = [[(a.key, a.frame, a.object_id) for a in scores.answers] for scores in found.clips.values()]
    assert questions[0] == questions[1] == questions[2]
    kept = json.loads((config.output / "evaluation.json").read_text())
    assert [row["name"] for row in kept["models"]] == found.names
    assert kept["clips"][STUDENT]["groups"]["all"]["jf"] == found.clips[STUDENT].summary()["jf"]
    assert len(film(config.output / "prediction.mp4")) == 24
    page = road.report.read_text()
    assert road.report == config.output / "report.html" and all(name in page for name in (*found.names, "select"))
    panels = sum(len(picture.panels) for picture in found.pictures)
    assert page.count("data:image/jpeg") == panels == 5 * 2 + 6 and "http" not in page.replace("http://www.w3", "")
    assert (
        "Cached maps of the teacher" in page
        and "per frame" in page
        and f"prompt: {road.evaluated.notes[0].split(chr(39))[1]}" in page
    )
    said = road.summary()
    assert f"{found.row(STUDENT).jf:.3f} (without memory {found.row(WITHOUT).jf:.3f}" in said
    assert str(road.report) in said and str(config.output / "prediction.mp4") in said


def test_the_maps_of_held_out_frames_are_made_as_the_cached_ones(walked: tuple[VideoRunConfig, RunResult]) -> None:
    parts = video_parts.VideoParts(walked[0])
    source = parts.train_source
    cached = StoredMaps.of_frames(list(open_stores(walked[0].store_root, parts.specs("")).values()))
    live = RunningFrames(parts.teacher(), source, parts.cached_view.geometry, parts.level, batch_size=2)
    for key in source.keys:
        frames = [(key, number) for number in source.record(key).annotated[::2]]
        found = live.answer(frames, live.read(frames))
        torch.testing.assert_close(found, cached.read(frames), rtol=2e-3, atol=1e-3)


def test_what_is_drawn_is_what_was_measured(walked: tuple[VideoRunConfig, RunResult]) -> None:
    source, found = video_parts.VideoParts(walked[0]).held_out_source, Answers()
    model = load_concept_model(walked[0].output)
    assert isinstance(model, StudentDetector)
    scores = evaluate_clips(model, source, source.keys, context=CONTEXT_FRAMES, batch_size=2, seen=found)
    assert scores == walked[1].evaluated.result.clips[STUDENT] and len(found.rles) == len(scores.answers)
    for answer in scores.answers:
        truth = source.masks(answer.key, answer.frame)[source.record(answer.key).objects.index(answer.object_id)]
        assert float(region_similarity(found.masks([answer])[0], truth)) == answer.j


def test_a_second_call_trains_and_caches_nothing(
    walked: tuple[VideoRunConfig, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, first = walked
    kept = [*config.store_root.iterdir(), *(config.output / "student").iterdir(), first.trained.checkpoint]
    kept = [path for path in kept if "lock" not in path.name]
    before = {path: path.read_bytes() for path in kept}
    resumed: list[object] = []
    monkeypatch.setattr(
        pipeline, "fit", lambda *args, **options: resumed.append(options["resume"]) or engine_fit(*args, **options)
    )
    monkeypatch.setattr(video_job.VideoJob, "evaluate", lambda self, config, merged: first.evaluated)
    again = run_pipeline(config)
    assert resumed == [None] and again.cached.written == 0 and again.trained.images_per_second == 0
    assert again.trained.terms == first.trained.terms and {path: path.read_bytes() for path in kept} == before


def test_the_student_is_a_folder_that_answers_to_words(
    walked: tuple[VideoRunConfig, RunResult], films: Path, tmp_path: Path
) -> None:
    config, road = walked
    model = load_concept_model(config.output)
    assert isinstance(model, StudentDetector) and road.trained.student == config.output / "student"
    about = model.model.config
    assert (about.memory_latents, about.memory_level, about.memory_context) == (12, 2, CONTEXT_FRAMES)
    saved = torch.load(road.trained.checkpoint, weights_only=True)["model"]
    state = model.model.state_dict()
    for name in ("memory_resampler.latents", "memory_attention.attention.o_proj.weight"):
        assert torch.equal(saved[name], state[name])
    assert (config.output / "student" / "tokenizer.json").is_file() and model.words.fits("red circle")
    processor = AutoProcessor.from_pretrained(config.output / "student")
    assert processor(text=["red circle"])["input_ids"] == model.words.encode(["red circle"])[0].tolist()
    image = tmp_path / "frame.png"
    Image.fromarray(film(next((films / "val").glob("*.mp4")))[0]).save(image)
    found = samdistill.predict(image, config.output / "student", "red circle", threshold=0.0)
    assert len(found) == 6  # a still image has no past, and the student its six queries


def test_the_demo_is_the_sandbox_recipe_on_videos_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    asked: dict[str, object] = {}

    def walk(config: VideoRunConfig, delivery: Delivery) -> None:
        asked["config"] = config
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_pipeline", walk)
    monkeypatch.setattr(video_job, "render_sandbox", lambda root, **how: asked.update(root=root, how=how))
    assert main(["demo", "--job", "video", "--out", str(tmp_path)]) == 130
    config, recipe = asked["config"], load_config("video/sandbox")
    assert isinstance(config, VideoRunConfig) and isinstance(recipe, VideoRunConfig)
    assert (config.output, config.data.root, asked["root"]) == (tmp_path / "run", tmp_path / "data", tmp_path / "data")
    assert asked["how"] == {"format": "sav", "size": 126} and config.evaluate.videos == 8
    assert (config.student, config.teacher, config.train) == (recipe.student, recipe.teacher, recipe.train)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path, "video", overrides=["evaluate.videos=3"])
    assert asked["config"].evaluate.videos == 3


def test_plan_counts_what_is_built_cached_and_trained(video: VideoRecipe, image_student: Path, tmp_path: Path) -> None:
    config = video(tmp_path / "run", "student.memory.level=3", ALIGNED, "train.batch_size=3", "clips.per_video=3")
    found = plan(config)
    built = load_with_memory(image_student, 12, 1, 2)
    rooms = {name: getattr(built, name) for name in ("memory_resampler", "memory_attention")}
    rooms["memory_level"] = built.vision_encoder.adapters[3].smooth  # what the alignment trains
    parts = {name: sum(p.numel() for p in room.parameters()) for name, room in rooms.items()}
    whole, trained = sum(p.numel() for p in built.parameters()), sum(parts.values())
    assert (found.parts, found.student_params) == (parts, whole)
    assert (found.weights_and_optimiser_bytes, found.frozen_bytes) == (16 * trained, 4 * (whole - trained))
    # four videos of 24 frames, every fourth annotated; a record is a seed and float16
    assert (found.videos, found.held_out_videos, found.counted, found.frames) == (4, 2, 4, 24)
    assert (found.record_shape, found.bytes_per_frame) == ((WIDTH, 4, 4), 4 + 2 * WIDTH * 4 * 4)
    assert found.cache_bytes == 24 * found.bytes_per_frame
    # twelve clips, three a step, an epoch of alignment and three of memory
    assert (found.clips_per_epoch, found.steps_per_epoch, found.steps) == (12, 4, 16)
    assert found.phases == (("align", 4), ("memory", 12)) and found.context == CONTEXT_FRAMES
    assert plan(video(tmp_path, "clips.own=[1.0, 1.0]")).cache_bytes == 0
    assert not (tmp_path / "run").exists()


def tiny(name: str, config: VideoRunConfig) -> list[str]:
    """Overrides that put the tiny models into any recipe and leave its memory's kind, terms and phases."""
    return [
        f"teacher.path={config.teacher.path}", "teacher.image_size=null", f"data.root={config.data.root}",
        "data.workers=0", f"student.start={config.student.start}", "student.memory.latents=12",
        "student.memory.layers=1", "train.batch_size=2", "train.accumulate=1", f"output={config.output}",
        *(["student.memory.windows=2"] if load_config(name).student.memory.windows else []),
    ]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_every_term_of_every_packaged_recipe_reaches_the_memory(
    name: str, video: VideoRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = video(tmp_path / "run")
    assert not config.store_root.exists()
    assert main(["check", name, "--json", *tiny(name, config)]) == 0
    terms = json.loads(capsys.readouterr().out)["terms"]
    recipe = load_config(name)
    wanted = {(phase.name, term) for phase in recipe.train.phases for term in phase.terms}
    assert wanted <= {(t["phase"], t["name"]) for t in terms}
    assert all(t["grad_norm"] > 0 and t["weight"] == getattr(recipe.loss, t["name"]) for t in terms)
    assert not (tmp_path / "run").exists()  # what it cached for this is gone


def test_check_reads_the_runs_own_cache_where_there_is_one(
    video: VideoRecipe, maps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = video(tmp_path / "run", maps)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "cache", lambda *_, **__: pytest.fail("there is one"))
        assert check(config, device="cpu").ok
        assert check(video(tmp_path / "run", "clips.own=[1.0, 1.0]"), device="cpu").ok  # which reads none
    dead = written(video(tmp_path / "run", maps, "loss.giou=0"), tmp_path / "run.yaml")
    assert main(["check", dead]) == 1
    assert "term 'giou' of phase 'memory' does not reach the student: its weight is 0" in capsys.readouterr().err
    with pytest.raises(UserError, match="'giou' of phase 'memory' does not reach"):
        run_pipeline(video(tmp_path / "run", maps, "loss.giou=0"))
    assert not (tmp_path / "run").exists()


def changed(image_student: Path, place: Path, **vision: int) -> Path:
    """A copy of the image student with one weight changed, or another configuration."""
    shutil.copytree(image_student, place)
    if vision:
        about = json.loads((place / "config.json").read_text())
        about["vision_config"] |= vision
        (place / "config.json").write_text(json.dumps(about))
    else:
        state = load_file(place / "model.safetensors")
        state["detr_decoder.presence_token.weight"] += 1
        save_file(state, place / "model.safetensors", {"format": "pt"})
    return place


def test_what_cannot_work_is_one_line(
    refused, video: VideoRecipe, image_student: Path, detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(video(tmp_path / "run"), tmp_path / "run.yaml")
    assert "no cached features here; run `samdistill cache`" in refused(["train", path])
    wide = changed(image_student, tmp_path / "wide" / "student", fpn_hidden_size=48)
    (tmp_path / "empty").mkdir()
    for verb in ("plan", "check", "train"):
        none = refused([verb, path, "student.start=null", "student.runs=nowhere"])
        assert "student.start: no student of the detection job below nowhere" in none
        assert "a student of 48 channels cannot remember maps of 32" in refused([verb, path, f"student.start={wide}"])
        other = refused([verb, path, f"student.start={detector[1]}"])
        assert "no student of the detection job" in other
    for verb in ("plan", "cache", "check", "train"):
        assert "unknown key 'clips.contxt'; did you mean 'context'?" in refused([verb, path, "clips.contxt=3"])
        assert "no video for data.kind=sav" in refused([verb, path, "data.root=empty"])
        assert "nowhere is not a folder" in refused([verb, path, "data.root=nowhere"])
    assert "4 clips are less than one batch" in refused(["plan", path, "clips.per_video=1", "train.batch_size=8"])
    assert "answers no questions" in refused(["cache", path, f"teacher.path={image_student}"])
    assert "--layout npy is for the prompt job" in refused(["cache", path, "--layout", "npy"])
    with pytest.raises(UserError, match="4 clips are less than one batch"):
        run_pipeline(video(tmp_path / "run", "clips.per_video=1", "train.batch_size=8"))
    assert not (tmp_path / "run").exists()


def test_kill_9_then_resume_is_the_uninterrupted_run_and_belongs_to_its_image_student(
    video: VideoRecipe, image_student: Path, maps: str, tmp_path: Path, refused
) -> None:
    epochs = "train.phases=[{name: memory, epochs: 4, lr: 1e-3, terms: [mask, box_l1, giou, iou, presence, select]}]"
    start = tmp_path / "image" / "student"
    shutil.copytree(image_student, start)
    settings = (maps, epochs, "clips.per_video=1", f"student.start={start}")
    whole, killed = (video(tmp_path / name, *settings) for name in ("whole", "killed"))
    path = written(killed, tmp_path / "run.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "samdistill", "train", path]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 600
        while not (killed.output / "ckpt_epoch_1.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (killed.output / "student").exists()
    again = ["train", path]
    other = changed(image_student, tmp_path / "other" / "student")
    assert "student.start" in refused([*again, f"student.start={other}"])
    shutil.move(start, tmp_path / "moved")
    shutil.copytree(other, start)  # of the same name
    assert "belongs to the image checkpoint" in refused(again)
    shutil.rmtree(start)
    shutil.move(tmp_path / "moved", start)
    assert main(again) == 0
    train(whole)
    names = {file.name for file in (whole.output / "student").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    for name in names:
        assert (killed.output / "student" / name).read_bytes() == (whole.output / "student" / name).read_bytes()


def test_predict_follows_a_video_and_a_folder_of_its_frames_alike(
    walked: tuple[VideoRunConfig, RunResult], films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, source = str(walked[0].output), sorted((films / "val").glob("*.mp4"))[0]
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(film(source)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number:05}.png")
    answers = []
    for place in (source, tmp_path / "frames"):
        words = ["--text", "circle", "--threshold", "0", "--frames", "9", "--out", str(tmp_path / "seen.mp4"), "--json"]
        assert main(["predict", str(place), run, *words]) == 0
        answers.append(json.loads(capsys.readouterr().out))
        assert len(film(tmp_path / "seen.mp4")) == 9
    assert answers[0]["frames"] == 9 and answers[0]["objects"] and answers[0]["context"] == CONTEXT_FRAMES
    assert answers[0]["objects"] == answers[1]["objects"] and answers[0]["instances"] == answers[1]["instances"]
    assert main(["predict", str(source), run, "--box", "5,5,40,40", "--frames", "2"]) == 0
    assert "in 2 frames, memory of 3; a frame: decode" in capsys.readouterr().out


def test_evaluate_prints_a_table_of_a_folder_of_videos(
    walked: tuple[VideoRunConfig, RunResult], films: Path, detector, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", str(walked[0].output), str(films), "--videos", "1", "--teacher", str(detector[1])]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in (WITHOUT, STUDENT, TEACHER, "J&F", "1 video, rules of sav"))
    assert main([*argv[:5], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"][1]["jf"] == walked[1].evaluated.result.row(STUDENT).jf  # the road measured the same
    assert found["clips"] == {}


def test_options_of_another_kind_of_model_or_data_are_refused(
    walked: tuple[VideoRunConfig, RunResult], films: Path, world: Path, image_student: Path, refused
) -> None:
    run, source = str(walked[0].output), str(next((films / "val").glob("*.mp4")))
    for words in (["--prompts", "box"], ["--threshold", "0.3"], ["--out", "x.json"], ["--images", "3"]):
        assert "do not go with videos" in refused(["evaluate", run, str(films), *words])
    for words in (["--videos", "1"], ["--convention", "sav"], ["--every-frame"], ["--workers", "2"]):
        assert "go with a folder of videos" in refused(["evaluate", run, str(world), *words])
        assert "go with a folder of videos" in refused(["evaluate", run, str(films), "--concepts", *words])
    assert "this model has no video memory" in refused(["evaluate", str(image_student), str(films)])
    assert "only a SAM with a memory follows" in refused(["predict", source, run, "--point", "3,4"])
    image = str(next((world / "images" / "train").iterdir()))
    assert "--frames goes with a video" in refused(["predict", image, run, "--text", "circle", "--frames", "3"])
    assert "no prompt given" in refused(["predict", source, run])
    assert "not a student but a 'efficient_sam3' model" in refused(["merge", run, "--into", "sandbox", "--out", "x"])
