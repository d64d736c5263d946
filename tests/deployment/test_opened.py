"""Exported folders, opened by the package and run by the standalone file: both answer as the model does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eager_files import eager
from PIL import Image
from tiny_students import save_tiny

import samdistill as sd
from samdistill.cli import main
from samdistill.deployment import opened, runtime
from samdistill.deployment.folder import export
from samdistill.deployment.runtime.model import files_of
from samdistill.inference.concepts import StudentDetector
from samdistill.inference.geometry import canvas_of
from samdistill.inference.pictures import image_batch, lay
from samdistill.inference.points import _on_canvas
from samdistill.ops.promptable import embed, predict
from samdistill.sandbox.scenes import render_scenes
from samdistill.sandbox.videos import VideoStyle, render_video
from samdistill.types import ConceptPrompts, ImageBatch, Prompts, UserError

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "samdistill", "transformers", "scipy", "onnx"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def standalone(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the folder's own predict.py in a process that can import neither torch nor this package."""
    command = [sys.executable, "-I", "-c", BLOCKED, str(folder / "predict.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)


def decoded(instance: dict) -> np.ndarray:
    height, width = instance["mask"]["size"]
    values = np.arange(len(instance["mask"]["counts"])) % 2 == 1
    return np.repeat(values, instance["mask"]["counts"]).reshape(width, height).T


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("sandbox-mobile", tmp_path_factory.mktemp("export") / "mobile", progress=False).folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "student")


@pytest.fixture(scope="module")
def remembering(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(source, tmp_path_factory.mktemp("export") / "remembering", progress=False).folder


@pytest.fixture(params=[pytest.param("files", marks=pytest.mark.slow), "dynamic", "static"])
def pair(
    request: pytest.FixtureRequest, source: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[runtime.Model, StudentDetector]:
    """The tiny student as the standalone file and as the package open its export.

    ``files`` are ONNX files. Otherwise PyTorch runs the parts, which ``test_onnx`` compares with their files.
    """
    if request.param == "files":
        folder = request.getfixturevalue("remembering")
        return runtime.Model(folder), sd.load(folder).network
    own = eager(sd.load(source).network, source, static=request.param == "static")
    monkeypatch.setattr(opened.runtime, "Model", lambda folder, precision, threads: own)
    return own, opened.open_detector(source)[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student without a memory."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "plain", latents=0)


@pytest.fixture(scope="module")
def listed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "listed"
    return export(plain, folder, vocabulary=["circle", "red star"], progress=False).folder


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(render_scenes(range(1), (150, 200)).images[0].permute(1, 2, 0).numpy()).save(path)
    return path


def test_the_standalone_file_gives_the_masks_of_a_promptable_model(mobile: Path, scene: Path, tmp_path: Path) -> None:
    model = sd.load("sandbox-mobile")
    cases = ([["--point", "60,60"]], [["--point", "60,60"], ["--point", "3,4,0"]], [["--box", "20,20,90,100"],
             ["--box", "50,10,150,140"]])  # fmt: skip
    for case in cases:
        found = standalone(
            mobile, scene, *(part for pair in case for part in pair), "--json", "--out", tmp_path / "seen.png"
        )
        assert found.returncode == 0, found.stderr
        points = [tuple(map(float, value.split(","))) for name, value in case if name == "--point"]
        boxes = [tuple(map(float, value.split(","))) for name, value in case if name == "--box"]
        wanted = model(scene, points=[(*p, 1)[:3] for p in points], boxes=boxes)
        instances = json.loads(found.stdout)["instances"]
        assert len(instances) == len(wanted)
        for one, mask, score in zip(instances, wanted.masks.numpy(), wanted.scores.tolist(), strict=True):
            assert agreement(decoded(one), mask) >= 0.999 and one["score"] == pytest.approx(score, abs=1e-4)
        assert Image.open(tmp_path / "seen.png").size == (200, 150)


def test_a_mask_prompt_corrects_like_the_model(mobile: Path, scene: Path) -> None:
    own, theirs = runtime.Model(mobile), sd.load("sandbox-mobile").network
    seen = own.encode(scene)
    first = own(seen, points=[(60, 60)])
    second = own(seen, points=[(60, 60), (100, 80, 0)], mask=first.logits)
    picture = lay(scene, canvas_of(theirs))
    given = _on_canvas([(60, 60, 1), (100, 80, 0)], [], picture)
    prompts = Prompts(given.valid, given.points, given.labels, masks=torch.from_numpy(first.logits)[None])
    with torch.no_grad():
        wanted = predict(theirs, embed(theirs, image_batch([picture])), prompts).best()[0][0]
    assert np.abs(second.logits - wanted.numpy()).max() <= 1e-3 * np.abs(wanted.numpy()).max()
    assert agreement(second.logits > 0, wanted.numpy() > 0) >= 0.999


def test_evaluate_gives_the_figures_of_the_model(mobile: Path, tmp_path: Path) -> None:
    sd.render_sandbox(tmp_path, train=1, val=3, progress=False)
    wanted = sd.evaluate("sandbox-mobile", tmp_path, progress=False).row("student")
    found = sd.evaluate(mobile, tmp_path, teacher="sandbox-mobile", progress=False).row("student")
    assert found.miou == pytest.approx(wanted.miou, abs=0.002)
    assert min(found.agreement.values()) >= 0.999 and found.cosine == pytest.approx(1, abs=1e-5)
    assert (found.parameters, found.trunk_gflops) == (wanted.parameters, wanted.trunk_gflops)
    assert found.latency_ms is not None and found.latency_ms > 0


def test_words_and_example_boxes_find_what_the_student_finds(
    pair: tuple[runtime.Model, StudentDetector], source: Path, scene: Path
) -> None:
    theirs, (own, network) = sd.load(source), pair
    again = sd.Model("export", network)
    assert repr(again).partition(": ")[2] == repr(theirs).partition(": ")[2] and again.kind == "detector with memory"
    for text, boxes in (("red circle", ()), (None, [(20, 20, 90, 100)])):
        wanted = theirs(scene, text=text, boxes=boxes, threshold=0.0)
        for found in (own(scene, text, boxes=boxes, threshold=0.0), again(scene, text=text, boxes=boxes, threshold=0)):
            assert np.allclose(found.scores, wanted.scores, atol=1e-4)
            shares = [agreement(np.asarray(m), w) for m, w in zip(found.masks, wanted.masks.numpy(), strict=True)]
            assert min(shares) >= 0.999


def test_several_images_and_phrases_are_answered_in_one_call(
    pair: tuple[runtime.Model, StudentDetector], source: Path
) -> None:
    images = ImageBatch.full(render_scenes(range(2), (126, 126)).images)
    prompts = ConceptPrompts.words(["red circle", "star", "blue"], [0, 1, 1])
    wanted, found = (network.answer(images, prompts) for network in (sd.load(source).network, pair[1]))
    assert torch.allclose(found.pred_masks, wanted.pred_masks, atol=1e-3)
    assert torch.allclose(found.scores, wanted.scores, atol=1e-4) and found.encoder is None


@pytest.mark.parametrize("context", [None, 0])
def test_a_video_has_the_ids_and_masks_of_the_session(
    pair: tuple[runtime.Model, StudentDetector], source: Path, context: int | None
) -> None:
    frames = render_video(0, (100, 120), style=VideoStyle(), frames=range(4)).images.permute(0, 2, 3, 1).numpy()
    networks = sd.load(source).network, pair[1]
    sessions: list[Any] = [sd.VideoSession(network, context=context, threshold=0.1) for network in networks]
    sessions.append(pair[0].video(context=context, threshold=0.1))
    for session in sessions:
        session.add_box((20, 20, 60, 60))
        session.add_mask(np.pad(np.ones((30, 30), bool), ((40, 30), (50, 40))), "star")
        session.add_text("red circle")
    seen = 0
    for frame in frames:
        wanted, *others = [session.push(frame) for session in sessions]
        for found in others:
            assert [(o.object_id, o.visible) for o in found] == [(o.object_id, o.visible) for o in wanted]
            assert all(agreement(o.mask, w.mask) >= 0.999 for o, w in zip(found, wanted, strict=True))
        seen += sum(one.visible for one in wanted)
    assert seen > len(frames)


def test_a_vocabulary_with_a_memory_follows_the_same_objects(source: Path) -> None:
    student = sd.load(source).network
    own = eager(student, source, vocabulary=["red circle", "star"]).video(threshold=0.1)
    theirs = sd.VideoSession(student, threshold=0.1)
    for session in (own, theirs):
        session.add_box((20, 20, 60, 60))
        session.add_text("star")
    for frame in render_video(0, (100, 120), frames=range(3)).images.permute(0, 2, 3, 1).numpy():
        for one, other in zip(own.push(frame), theirs.push(frame), strict=True):
            assert (one.object_id, one.visible) == (other.object_id, other.visible)
            assert agreement(one.mask, other.mask) >= 0.999
    with pytest.raises(runtime.ModelError, match="'blue' is not a concept of this model; it knows: red circle, star"):
        own.add_text("blue")


@pytest.mark.slow
def test_frames_are_followed_from_the_command_line(remembering: Path, source: Path, tmp_path: Path) -> None:
    frames, wanted = render_video(0, (100, 120), frames=range(3)).images, sd.load(source)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "frames" / f"{number}.png")
    given = ("--frames", tmp_path / "frames", "--box", "20,20,60,60", "--threshold", "0.1", "--json")
    found = standalone(remembering, *given, "--out", tmp_path / "seen")
    assert found.returncode == 0, found.stderr
    followed = wanted.track(tmp_path / "frames", boxes=[(20, 20, 60, 60)], threshold=0.1)
    for line, frame in zip(found.stdout.splitlines(), followed, strict=True):
        seen = [one for one in frame.objects if one.visible]
        objects = json.loads(line)["objects"]
        assert [one["id"] for one in objects] == [one.object_id for one in seen]
        assert all(agreement(decoded(one), other.mask) >= 0.999 for one, other in zip(objects, seen, strict=True))
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == ["0.png", "1.png", "2.png"]


@pytest.mark.slow
def test_evaluate_gives_the_figures_of_the_student(remembering: Path, source: Path, tmp_path: Path) -> None:
    sd.render_sandbox(tmp_path / "images", train=1, val=4, size=126, format="coco", progress=False)
    sd.render_sandbox(tmp_path / "videos", train=1, val=1, size=126, format="sav", progress=False)
    words, videos = tmp_path / "images" / "concepts_val.json", tmp_path / "videos"
    for data, settings in ((words, {"threshold": 0.1}), (videos, {})):
        rows = [
            sd.load(model).evaluate(data, progress=False, **settings).to_dict()["models"]
            for model in (source, remembering)
        ]
        for wanted, found in zip(*rows, strict=True):
            figures = [name for name, value in wanted.items() if isinstance(value, float) and name != "latency_ms"]
            assert figures
            assert [found[name] for name in figures] == pytest.approx(
                [wanted[name] for name in figures], abs=0.002, nan_ok=True
            )


def test_a_sam3_is_opened(tmp_path: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = sd.load("sandbox")
    theirs.network.words.save(tmp_path)
    own = eager(theirs.network, tmp_path)
    monkeypatch.setattr(opened.runtime, "Model", lambda folder, precision, threads: own)
    again = sd.Model("export", opened.open_detector(tmp_path)[0])
    assert repr(again).partition(": ")[2] == repr(theirs).partition(": ")[2]
    for text, boxes in (("circle", ()), ("red star", ()), (None, [(20, 20, 90, 100)])):
        wanted = theirs(scene, text=text, boxes=boxes, threshold=0.1)
        for found in (
            own(scene, text, boxes=boxes, threshold=0.1),
            again(scene, text=text, boxes=boxes, threshold=0.1),
        ):
            assert np.allclose(found.scores, wanted.scores, atol=1e-4)
            shares = [agreement(np.asarray(m), w) for m, w in zip(found.masks, wanted.masks.numpy(), strict=True)]
            assert min(shares, default=1) >= 0.999
    assert len(wanted)


@pytest.mark.slow
def test_a_vocabulary_answers_for_its_phrases_alone(listed: Path, plain: Path, scene: Path) -> None:
    wanted = sd.load(plain)(scene, text="circle", threshold=0.05)
    found = standalone(listed, scene, "--text", "circle", "--threshold", "0.05", "--json")
    instances = json.loads(found.stdout)["instances"]
    assert len(instances) == len(wanted) > 0
    for one, mask in zip(instances, wanted.masks.numpy(), strict=True):
        assert agreement(decoded(one), mask) >= 0.999
    again = sd.load(listed)
    assert len(again(scene, text="circle", threshold=0.05)) == len(wanted)
    with pytest.raises(UserError, match="'blue' is not in the vocabulary this model reads; it knows: circle, red star"):
        again(scene, text="blue")
    refused = standalone(listed, scene, "--text", "blue")
    assert refused.returncode == 2
    assert refused.stderr == "error: 'blue' is not a concept of this model; it knows: circle, red star\n"
    refused = standalone(listed, scene, "--box", "1,1,50,50")
    assert refused.returncode == 2 and "an example box needs decoder_boxes, which was not exported" in refused.stderr


def test_damaged_missing_and_newer_folders_are_refused_in_one_line(
    mobile: Path, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoilt(name: str) -> Path:
        return Path(shutil.copytree(mobile, tmp_path / name))

    damaged, missing, newer = map(spoilt, ("damaged", "missing", "newer"))
    with (damaged / "onnx" / "vision_encoder.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\1\2\3")
    (missing / "config.json").unlink()
    record = json.loads((newer / "export.json").read_text())
    (newer / "export.json").write_text(json.dumps({**record, "format": 99}))
    for folder, why in (
        (damaged, "vision_encoder.onnx: damaged: its SHA-256 is not the one in export.json"),
        (missing, "config.json: missing; export.json lists it"),
        (newer, "export.json has format 99"),
    ):
        with pytest.raises(UserError, match=why) as caught:
            sd.load(folder)
        assert "\n" not in str(caught.value)
        assert main(["predict", str(scene), str(folder), "--point", "5,5"]) == 2
        assert why in " ".join(capsys.readouterr().err.split())
    found = standalone(damaged, scene, "--point", "5,5")
    assert found.returncode == 2 and found.stderr.count("\n") == 1


def test_a_missing_onnxruntime_names_the_extra(mobile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed; .*samdistill\[onnx\]"):
        sd.load(mobile)


def test_another_kind_or_size_is_refused(mobile: Path, scene: Path) -> None:
    from samdistill.checkpoints.promptable import load_promptable
    from samdistill.inference.concepts import load_concept_model

    with pytest.raises(UserError, match="an exported promptable takes points and boxes only; give a detector model"):
        load_concept_model(mobile)
    with pytest.raises(UserError, match="exported for images of 126 px"):
        load_promptable(mobile, 252)
    assert load_promptable(mobile, 126).to("cpu").config.image_size == 126


def test_prompts_that_fixed_axes_do_not_take_are_refused(scene: Path, tmp_path: Path) -> None:
    own = eager(sd.load("sandbox-mobile").network, tmp_path, static=True)
    found = own(scene, points=[(20, 20)])
    assert own(scene, boxes=[(5, 5, 30, 30), (9, 9, 20, 20)]).masks.shape[0] == 2
    assert own(scene, points=[(20, 20)], mask=found.logits).masks.shape == found.masks.shape
    with pytest.raises(runtime.ModelError, match="reads boxes alone; give no point"):
        own(scene, points=[(20, 20)], boxes=[(5, 5, 30, 30)])
    with pytest.raises(runtime.ModelError, match="an axis of input_points has 2 elements instead of 1"):
        own(scene, points=[(20, 20), (3, 3, 0)])
    with pytest.raises(runtime.ModelError, match="an axis of input_points has 0 elements instead of 1"):
        own(scene, boxes=[(5, 5, 30, 30)], mask=found.logits)


def test_a_precision_in_which_a_part_failed_is_not_opened(tmp_path: Path) -> None:
    def row(part: str, precision: str, passed: bool = True) -> dict[str, object]:
        return {"part": part, "precision": precision, "target": "onnx", "passed": passed, "path": f"{part}.{precision}"}

    rows = [row("encoder", "fp16"), row("decoder", "fp16"), row("encoder", "int8", False), row("decoder", "int8")]
    assert files_of({"files": rows}, None, tmp_path) == {"encoder": "encoder.fp16", "decoder": "decoder.fp16"}
    with pytest.raises(runtime.ModelError, match="no ONNX files in int8; there is: fp16"):
        files_of({"files": rows}, "int8", tmp_path)
