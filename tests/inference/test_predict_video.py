"""``predict_video``, with tiny students of random weights and small videos: what is answered, written and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from samdistill.checkpoints.student import load_with_memory
from samdistill.inference.concepts import Box, StudentDetector, load_concept_model
from samdistill.inference.drawing import COLOURS
from samdistill.inference.predict_video import draw_tracked, predict_video
from samdistill.inference.video import Tracked, VideoSession
from samdistill.sandbox.concepts import VOCABULARY, sandbox_words
from samdistill.students import EfficientSam3Model, efficient_sam3_config
from samdistill.types import UserError

TEXT = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "projection_dim": 32}  # fmt: skip
SIZE, COUNT, RATE = (45, 61), 12, Fraction(24000, 1001)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs with a student of images, and with the same and a memory; they see something everywhere."""
    folder = tmp_path_factory.mktemp("runs")
    student = EfficientSam3Model(efficient_sam3_config("efficientvit_b0", 126, 32, 2, 64, 1, 1, 5, TEXT))
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    student.save_pretrained(folder / "image" / "student")
    torch.manual_seed(0)
    load_with_memory(folder / "image" / "student", 12, 1, 2).save_pretrained(folder / "video" / "student")
    for name in ("image", "video"):
        sandbox_words().save(folder / name / "student")
    return {name: folder / name for name in ("image", "video")}


def pictures(count: int = COUNT, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    frames = np.random.default_rng(0).integers(0, 90, (count, *size, 3), dtype=np.uint8)
    for number, frame in enumerate(frames):
        frame[10:25, 3 * number : 3 * number + 15] = (230, 30, 40)
    return list(frames)


def write(path: Path, frames: list[np.ndarray]) -> Path:
    """All colours at full resolution, so that sides may be odd; a key frame every four frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "12", "g": "4", "bf": "0"})
        (stream.height, stream.width), stream.pix_fmt = frames[0].shape[:2], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("video") / "a.mp4", pictures())


def decoded(path: Path) -> tuple[list[np.ndarray], Fraction | None, str]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return frames, stream.average_rate, str(stream.pix_fmt)


def ask(video: Path, run: Path | StudentDetector, **settings: Any) -> Any:
    return predict_video(video, run, progress=False, **{"threshold": 0.0, **settings})


def test_a_video_is_followed_drawn_and_written(video: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "seen.mp4"
    found = ask(video, runs["video"], text="red circle", boxes=[(0, 10, 15, 25), (40, 5, 60, 30)], out=out)
    frames, rate, pixels = decoded(out)
    assert len(frames) == COUNT and frames[0].shape == (46, 62, 3) and rate == RATE and pixels == "yuv420p"
    assert [path.name for path in tmp_path.iterdir()] == ["seen.mp4"]
    assert (found.frames, found.size, found.context, found.out) == (COUNT, SIZE, 8, out)
    assert found.rate == pytest.approx(float(RATE)) and all(found.seconds[k] > 0 for k in ("decode", "model", "draw"))
    written = json.loads(json.dumps(found.to_dict()))
    assert (written["width"], written["height"], len(written["instances"])) == (61, 45, COUNT)
    assert len(written["objects"]) == 2 and written["boxes"] == [[0, 10, 15, 25], [40, 5, 60, 30]]
    for one in written["objects"]:
        shows = [n for n, frame in enumerate(written["instances"]) if one["id"] in [seen["id"] for seen in frame]]
        assert [one["first"], one["last"], one["frames"]] == [shows[0], shows[-1], len(shows)]
        assert one["phrase"] == "red circle"
    for seen in written["instances"][-1]:
        mask = coco_mask.decode(seen["segmentation"])
        (left, top, right, bottom), (rows, columns) = seen["box"], mask.nonzero()
        assert mask.shape == SIZE and 0 <= seen["score"] <= 1
        assert [left, top, right, bottom] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("boxes", [(), ((0, 10, 15, 25), (20, 5, 40, 30))])
def test_the_answer_is_that_of_a_session(boxes: tuple[Box, ...], video: Path, runs: dict[str, Path]) -> None:
    model = load_concept_model(runs["video"])
    assert isinstance(model, StudentDetector)
    found = ask(video, model, text="star", boxes=boxes)
    session = VideoSession(model, threshold=0)
    for box in boxes:
        session.add_box(box, "star")
    if not boxes:
        session.add_text("star")
    frames, *_ = decoded(video)
    assert [(one.object_id, one.phrase) for one in found.objects] == [(1, "star"), (2, "star")][: len(boxes) or 1]
    for frame, seen in zip(frames, found.seen, strict=True):
        expected = [one for one in session.push(frame) if one.visible]
        assert [(s.object_id, s.score, s.box) for s in seen] == [(e.object_id, e.score, e.box) for e in expected]
        assert all((coco_mask.decode(s.rle) == e.mask).all() for s, e in zip(seen, expected, strict=True))


def test_a_folder_of_frames_is_a_video_too(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(pictures(5, (44, 60))):
        Image.fromarray(frame).save(folder / f"{number:05d}.png")
    (folder / "notes.txt").touch()
    (folder / ".hidden.png").touch()
    film = write(tmp_path / "a.mp4", pictures(5, (44, 60)))
    shots = ask(folder, runs["image"], boxes=[(0, 10, 15, 25)], out=tmp_path / "b.mp4")
    assert (shots.frames, shots.rate, shots.context) == (5, 24.0, 0)  # a student of images goes without memory
    assert decoded(tmp_path / "b.mp4")[0][0].shape == (44, 60, 3)
    assert len(ask(film, runs["image"], text="star", frames=3).seen) == 3
    assert len(ask(film, runs["image"], text="star", frames=99).seen) == 5


def test_an_object_keeps_its_colour() -> None:
    frame = np.full((60, 80, 3), 100, np.uint8)

    def tracked(number: int, left: int, visible: bool) -> Tracked:
        mask = np.zeros((60, 80), bool)
        mask[10:50, left : left + 30] = visible
        box = (left, 10.0, left + 30.0, 50.0) if visible else (0.0,) * 4
        return Tracked(number, None, 0.9, visible, mask, box)  # type: ignore[arg-type]

    both = draw_tracked(frame, [tracked(1, 0, True), tracked(2, 40, True)])
    second = draw_tracked(frame, [tracked(1, 0, False), tracked(2, 40, True)])
    none = draw_tracked(frame, [tracked(1, 0, False), tracked(2, 40, False)])
    assert np.array_equal(both[:, 36:], second[:, 36:]) and (none == 85).all()
    assert np.array_equal(second[:, :36], none[:, :36])
    for column, colour in ((5, COLOURS[0]), (45, COLOURS[1])):
        tint = 0.45 * 85 + 0.55 * np.array(colour)
        assert np.abs(both[15, column] - tint).max() <= 1
    number = second[22:38, 45:65]
    assert (number == 0).all(-1).any() and (number > 220).all(-1).any()  # its id, white on black
    thirteen = [tracked(number, 0, number == 13) for number in range(1, 14)]
    assert np.abs(draw_tracked(frame, thirteen)[15, 5] - (0.45 * 85 + 0.55 * np.array(COLOURS[0]))).max() <= 1


def broken_file(folder: Path) -> tuple[Path, str]:
    path = write(folder / "broken.mp4", pictures())
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][6]
        assert packet.pos is not None
        start, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[start + 4 : start + size] = bytes(size - 4)
    path.write_bytes(data)
    return path, r"broken\.mp4 is not a readable video: frame \d+ or one that it depends on is damaged"


def broken_folder(folder: Path) -> tuple[Path, str]:
    place = folder / "frames"
    place.mkdir()
    for number, frame in enumerate(pictures(6)):
        Image.fromarray(frame).save(place / f"{number}.jpg")
    (place / "4.jpg").write_bytes(b"no image")
    return place, r"frames/4\.jpg is not a readable image"


def uneven_folder(folder: Path) -> tuple[Path, str]:
    place, _ = broken_folder(folder)
    Image.new("RGB", (30, 20)).save(place / "4.jpg")
    return place, r"4\.jpg: frame 4 is 30 x 20 pixels, the first 61 x 45"


@pytest.mark.parametrize("broken", [broken_file, broken_folder, uneven_folder])
@pytest.mark.parametrize("there", [True, False])
def test_a_video_that_breaks_leaves_what_was_there(
    broken: Callable[[Path], tuple[Path, str]], there: bool, runs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "seen.mp4"
    if there:
        out.write_bytes(b"an earlier one")
    path, complaint = broken(tmp_path)
    with pytest.raises(UserError, match=complaint):
        ask(path, runs["image"], text="star", out=out)
    assert [(p.name, p.read_bytes()) for p in out.parent.iterdir()] == [("seen.mp4", b"an earlier one")] * there


def test_an_interrupted_run_leaves_nothing(
    video: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pushed, push = load_concept_model(runs["image"]), [], VideoSession.push

    def interrupted(self: VideoSession, frame: np.ndarray) -> tuple[Tracked, ...]:
        pushed.append(frame)
        if len(pushed) == 5:
            assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
            raise KeyboardInterrupt
        return push(self, frame)

    monkeypatch.setattr(VideoSession, "push", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(video, model, text="star", out=tmp_path / "a.mp4")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "no prompt given"),
        ({"text": "star", "threshold": 1.1}, "--threshold: 1.1"),
        ({"text": "star", "geometry": "round"}, "unknown geometry 'round'"),
        ({"text": "star", "frames": 0}, "--frames must be at least 1, got 0"),
        ({"text": "star", "out": "a.avi"}, r"--out: .*a\.avi does not end in \.mp4"),
        ({"text": "star", "out": "nowhere/a.mp4"}, "--out: there is no folder"),
        ({"text": "star", "video": "missing.mp4"}, r"missing\.mp4: no such video"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_opened(
    settings: dict[str, Any], complaint: str, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samdistill.inference.predict_video._open", lambda _: pytest.fail("opened"))
    places = {name: tmp_path / settings[name] for name in ("out", "video") if name in settings}
    with pytest.raises(UserError, match=complaint):
        ask(**{"video": video, "run": tmp_path / "no model", **settings, **places})


def test_what_does_not_go_together_is_refused(video: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"no video")
    own = shutil.copy(video, tmp_path / "own.mp4")
    for settings, complaint in (
        ({"text": "red red red red red star"}, "longer than the 6 tokens"),
        ({"text": " "}, "--text: empty"),
        ({"boxes": [(5, 5, 62, 40)]}, "reaches beyond the image, which is 61 x 45 pixels"),
        ({"text": "star", "run": "sandbox"}, "sandbox: no memory in it, so it cannot track; give a run"),
        ({"text": "star", "run": tmp_path}, r"has no config\.json"),
        ({"text": "star", "video": tmp_path / "empty"}, "empty holds no frame"),
        ({"text": "star", "video": tmp_path / "a.mp4"}, r"a\.mp4 is not a readable video"),
        ({"text": "star", "video": own, "out": own}, r"own\.mp4 is the input .*own\.mp4 itself"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=complaint):
            ask(**{"video": video, "run": runs["image"], **settings})  # type: ignore[arg-type]
    assert own.read_bytes() == video.read_bytes()
