"""``load`` opens everything, and one class of results comes of it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from pycocotools import mask as coco_mask

import samdistill as sd
from samdistill.cli import main
from samdistill.inference.concepts import AT_ONCE, ask_image, ask_images
from samdistill.inference.geometry import canvas_of
from samdistill.inference.pictures import lay
from samdistill.sandbox.render import render_sandbox


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes in one folder."""
    root = tmp_path_factory.mktemp("photos")
    render_sandbox(root, train=3, val=1, size=96, progress=False)
    return root / "images" / "train"


@pytest.mark.parametrize(
    ("name", "kind"), [("sandbox-student", "detector"), ("sandbox", "detector"), ("sandbox-mobile", "promptable")]
)
def test_a_model_knows_what_it_is(name: str, kind: str) -> None:
    model = sd.load(name)
    assert model.kind == kind and kind in repr(model) and isinstance(model.module, torch.nn.Module)
    if kind == "detector":
        with pytest.raises(sd.UserError):
            model(np.zeros((40, 40, 3), np.uint8), points=[(3, 3)])


def test_a_file_an_image_and_an_array_give_the_same(photos: Path) -> None:
    model, file = sd.load("sandbox-student"), sorted(photos.glob("*.jpg"))[0]
    image = Image.open(file)
    found = [model(given, text="red circle", threshold=0.0) for given in (file, str(file), image, np.asarray(image))]
    for other in found[1:]:
        assert torch.equal(found[0].masks, other.masks) and torch.equal(found[0].scores, other.scores)
    assert len(found[0]) > 0 and [result.name for result in found] == [str(file)] * 2 + [""] * 2


def test_many_images_give_a_list_in_order(photos: Path) -> None:
    model, files = sd.load("sandbox-mobile"), sorted(photos.glob("*.jpg"))
    asked = {"points": [(48, 48)]}
    whole = model(photos, **asked)
    assert [Path(result.name) for result in whole] == files
    for given in (files, str(photos / "*.jpg")):
        assert [result.scores.tolist() for result in model(given, **asked)] == [r.scores.tolist() for r in whole]
    with pytest.raises(sd.UserError, match="no such image"):
        model(photos / "none.jpg", **asked)


QUESTIONS = {
    "phrase": ("sandbox-student", {"text": "red circle", "threshold": 0.0}),
    "examples": ("sandbox-student", {"text": "circle", "boxes": [(5, 5, 40, 40), (20, 9, 50, 60)], "threshold": 0.0}),
    "point": ("sandbox-mobile", {"points": [(48, 30)]}),
    "boxes": ("sandbox-sam", {"boxes": [(5, 5, 40, 40), (20, 9, 50, 60)]}),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_batch_is_answered_as_its_images_are(name: str, photos: Path, tmp_path: Path) -> None:
    """Images of several sizes, in batches of two and one; the same image twice gives the same answer twice."""
    (source, asked), images = QUESTIONS[name], [Image.open(file) for file in sorted(photos.glob("*.jpg"))]
    mixed = [images[0], images[1].crop((0, 0, 90, 64)), np.asarray(images[2].resize((150, 70))), images[0], images[1]]
    model = sd.load(source)
    together, alone = model(mixed, batch_size=2, **asked), [model(image, **asked) for image in mixed]
    assert len(together) == len(mixed)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.image.tobytes() == theirs.image.tobytes() and len(ours) == len(theirs) > 0
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.boxes, theirs.boxes, atol=1e-3, rtol=1e-5)
        assert (ours.masks != theirs.masks).float().mean() < 1e-3
    assert torch.equal(together[0].masks, together[3].masks) or (together[0].masks ^ together[3].masks).sum() < 10


def test_a_pil_image_is_decoded_in_the_calling_thread(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same undecoded image several times: PIL's decoder fails or gives other pixels if two threads run it."""
    file = sorted(photos.glob("*.jpg"))[0]
    image, threads = Image.open(file), set[int]()
    load = JpegImageFile.load

    def watched(self: JpegImageFile) -> object:
        if self is image:
            threads.add(threading.get_ident())
        return load(self)

    monkeypatch.setattr(JpegImageFile, "load", watched)
    found = sd.load("sandbox-mobile")([image] * 6, points=[(48, 30)], batch_size=2)
    assert threads == {threading.get_ident()}
    assert {result.image.tobytes() for result in found} == {Image.open(file).convert("RGB").tobytes()}


def test_a_truncated_pil_image_is_one_clear_line(photos: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(sorted(photos.glob("*.jpg"))[0].read_bytes()[:900])
    for given in (Image.open(cut), [Image.open(cut)]):
        with pytest.raises(sd.UserError, match=r"cut\.jpg cannot be decoded: image file is truncated"):
            sd.load("sandbox-mobile")(given, points=[(4, 4)])


def test_a_phrase_is_answered_alike_beside_others(photos: Path) -> None:
    """Also where the phrases are more than one call asks."""
    detector, image = sd.load("sandbox-student").network, Image.open(sorted(photos.glob("*.jpg"))[0])
    texts = [f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "square", "star")] * 4
    (found,) = ask_images(detector, [lay(image, canvas_of(detector))], texts, threshold=0.0)
    assert len(found) == len(texts) > AT_ONCE
    for text, own in list(zip(texts, found, strict=True))[::7]:
        torch.testing.assert_close(
            own.scores, ask_image(detector, image, text, threshold=0.0).scores, atol=1e-5, rtol=0
        )


def test_unreadable_files_are_left_out_of_folders_and_refused_in_lists(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in photos.glob("*.jpg"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = tmp_path / "a_broken.jpg"
    broken.write_bytes(b"no image")
    model, asked = sd.load("sandbox-mobile"), {"points": [(48, 48)], "batch_size": 1}
    assert [Path(result.name).name for result in model(tmp_path, **asked)] == sorted(f.name for f in photos.glob("*"))
    assert "a_broken.jpg" in caplog.text
    for given in (broken, [*photos.glob("*.jpg"), broken]):
        with pytest.raises(sd.UserError, match="not a readable image"):
            model(given, **asked)
    with pytest.raises(sd.UserError, match="--batch-size must be at least 1, got 0"):
        model(tmp_path, points=[(48, 48)], batch_size=0)


def test_a_result_is_coco_and_supervision_and_a_picture(photos: Path, tmp_path: Path) -> None:
    file = sorted(photos.glob("*.jpg"))[0]
    result = sd.load("sandbox-student")(file, text="red circle", threshold=0.0)
    annotations = result.to_coco(image_id=7, first_id=3)
    assert [one["id"] for one in annotations] == list(range(3, 3 + len(result)))
    for one, mask, box in zip(annotations, result.masks.numpy(), result.boxes.tolist(), strict=True):
        assert one["image_id"] == 7 and (coco_mask.decode(one["segmentation"]).astype(bool) == mask).all()
        left, top, width, height = one["bbox"]
        assert [left, top, left + width, top + height] == pytest.approx(box, abs=1e-4)
    assert result.save(tmp_path / "drawn.png") == tmp_path / "drawn.png"
    assert Image.open(tmp_path / "drawn.png").size == result.image.size
    with pytest.raises(sd.UserError, match="supervision is not installed"):
        result.to_supervision()
    with pytest.raises(sd.UserError, match="does not end in"):
        result.save(tmp_path / "drawn.bmp")


def test_it_evaluates_and_tracks(world: Path, films: Path) -> None:
    mobile = sd.load("sandbox-mobile")
    by_name = sd.evaluate("sandbox-mobile", world, images=2, progress=False, prompts=["box"])
    assert mobile.evaluate(world, images=2, progress=False, prompts=["box"]).rows[0].miou == by_name.rows[0].miou
    with pytest.raises(sd.UserError, match="cannot track"):
        mobile.track(next(films.rglob("*.mp4")), text="red circle")
    video = next(films.rglob("*.mp4"))
    frames = list(sd.load("sandbox-student").track(video, text="red circle", frames=2))
    whole = sd.predict_video(video, "sandbox-student", "red circle", frames=2, progress=False)
    assert [frame.number for frame in frames] == [0, 1] and frames[0].draw().size == frames[0].image.shape[1::-1]
    seen = [[(o.object_id, o.score) for o in frame.objects if o.visible] for frame in frames]
    assert seen == [[(o.object_id, o.score) for o in frame] for frame in whole.seen]


@pytest.mark.parametrize("format", ["coco", "yolo"])
def test_a_folder_is_labelled(format: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for file in photos.glob("*.jpg"):
        (tmp_path / "in" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    out, words = tmp_path / "out", ["--text", "red circle, blue square", "--threshold", "0.01"]
    argv = ["predict", str(tmp_path / "in"), "sandbox-student", *words, "--format", format, "--out", str(out), "--json"]
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["images"] == 3 and [Path(bad["key"]).name for bad in said["skipped"]] == ["broken.jpg"]
    model, file = sd.load("sandbox-student"), sorted((tmp_path / "in").glob("sa_*.jpg"))[0]
    wanted = [model(file, text=text, threshold=0.01) for text in ("red circle", "blue square")]
    if format == "coco":
        found = json.loads((out / "annotations.json").read_text())
        assert [category["name"] for category in found["categories"]] == ["red circle", "blue square"]
        (image,) = (one for one in found["images"] if one["file_name"] == str(file))
        own = [one for one in found["annotations"] if one["image_id"] == image["id"]]
        assert [one["category_id"] for one in own] == [1] * len(wanted[0]) + [2] * len(wanted[1])
        assert len({one["id"] for one in found["annotations"]}) == len(found["annotations"]) == said["instances"]
        assert [one["score"] for one in own] == pytest.approx([s for r in wanted for s in r.scores.tolist()], abs=1e-5)
    else:
        assert (out / "classes.txt").read_text().splitlines() == ["red circle", "blue square"]
        lines = (out / "labels" / f"{file.stem}.txt").read_text().splitlines()
        assert len(lines) == sum(map(len, wanted))
        numbers = [float(part) for part in lines[0].split()[1:]]
        left, top, right, bottom = wanted[0].boxes[0].tolist() if len(wanted[0]) else wanted[1].boxes[0].tolist()
        width, height = wanted[0].image.size
        assert numbers == pytest.approx(
            [(left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height],
            abs=1e-5,
        )  # fmt: skip
    assert len(list((out / "pictures").glob("*.png"))) >= 3
    plain = sd.label_images(tmp_path / "in", model.network, "red circle", tmp_path / "plain", pictures=False)
    assert plain.images == 3 and len(plain.skipped) == 1 and not (tmp_path / "plain" / "pictures").exists()


def test_distill_is_the_pipeline_of_any_job(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from samdistill import pipeline

    asked = []
    monkeypatch.setattr(pipeline, "run_pipeline", lambda config, export: asked.append(config))
    sd.distill("encoder", world, teacher="sandbox", student="es_ev_s", out=tmp_path / "a", train={"epochs": 5})
    sd.distill("prompt", world, teachers={"sandbox-sam": 0.7, "sandbox-mobile": 0.3}, student="sandbox-mobile",
               out=str(tmp_path / "b"))  # fmt: skip
    sd.distill("detection", world, teacher="sandbox", out=tmp_path / "c", overrides=["train.batch_size=3"])
    encoder, prompt, detection = asked
    assert (encoder.job, encoder.train.epochs, encoder.student.backbone) == ("encoder", 5, "es_ev_s")
    assert encoder.train.batch_size == 6 and encoder.output == tmp_path / "a"  # a quarter of 24 images
    assert [(t.checkpoint, t.weight) for t in prompt.teachers] == [("sandbox-sam", 0.7), ("sandbox-mobile", 0.3)]
    assert str(prompt.student.start) == "sandbox-mobile" and detection.train.batch_size == 3
    for wrong, message in (
        ({}, "give either teacher, or teachers"),
        ({"teachers": {"a": 1, "b": 1}}, "one teacher, not 2"),
    ):
        with pytest.raises(sd.UserError, match=message):
            sd.distill("encoder", world, out=tmp_path / "d", **wrong)
    with pytest.raises(sd.UserError, match="no videos with masks"):
        sd.distill("video", world, teacher="sandbox", out=tmp_path / "d")


def test_the_sandbox_s_teacher_on_photographs_and_unknown_words_are_warned_of(
    photos: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from samdistill import pipeline

    monkeypatch.setattr(pipeline, "run_pipeline", lambda config, export: config)
    sd.distill("encoder", world / "images" / "train", teacher="sandbox", student="es_ev_s", out=tmp_path / "a")
    assert "was trained on rendered scenes only" in caplog.text
    caplog.clear()
    sd.distill("encoder", world, teacher="sandbox", student="es_ev_s", out=tmp_path / "a")
    assert not caplog.records
    model = sd.load("sandbox-student")
    model(sorted(photos.glob("*.jpg"))[0], text="red zebra")
    assert "does not know the word(s) zebra;" in caplog.text
    caplog.clear()
    model(sorted(photos.glob("*.jpg"))[0], text="red circle")
    assert not caplog.records


def test_completion_shows_the_face() -> None:
    assert set(sd.__all__) <= set(dir(sd)) and {"load", "distill", "list_models"} <= set(sd.__all__)
    assert sd.list_models("es_rv_*") == ["es_rv_l", "es_rv_m", "es_rv_s"]
