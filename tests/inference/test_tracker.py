"""Tracking with a SAM's own memory, against transformers' sessions and processors, on merged models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from small_students import make_student
from tiny_sam3 import memory_config, video_config
from transformers import AutoProcessor, Sam2VideoModel, Sam3TrackerVideoModel, Sam3VideoModel
from transformers.models.sam3_video import modeling_sam3_video

import samdistill as sd
from samdistill.checkpoints.merge import merge
from samdistill.checkpoints.trackers import load_tracker, load_worded
from samdistill.data.sav import SavSource
from samdistill.inference.tracker import TrackerSession, WordSession
from samdistill.sandbox.concepts import CONTEXT, VOCABULARY, sandbox_words
from samdistill.types import UserError

SIDE, COUNT = 126, 20  # more frames than the memory reaches back, so that some are forgotten
BOX, POINTS = (20.0, 15.0, 90.0, 80.0), [(50.0, 40.0, 1), (5.0, 5.0, 0)]


def scrambled(model: Any, seed: int) -> Any:
    """Weights for which signals keep their size, so that answers depend on frames and memory."""
    made = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=made) / fan_in**0.5
    return model.eval()


def worded_config() -> Any:
    config = video_config()
    config.detector_config.text_config.vocab_size = len(VOCABULARY)
    config.detector_config.text_config.max_position_embeddings = CONTEXT
    config.score_threshold_detection = config.new_det_thresh = 0.0
    return config


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tracker and of a detector with a tracker, both with a distilled trunk."""
    root = tmp_path_factory.mktemp("trackers")
    make_student().save_pretrained(root / "run" / "student")
    models = {
        "tracker": scrambled(Sam3TrackerVideoModel(memory_config()), 0),
        "worded": scrambled(Sam3VideoModel(worded_config()), 0),
    }
    for part in (models["tracker"], models["worded"].tracker_model):
        part.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(10.0)  # the object counts as present
    for name, model in models.items():
        model.save_pretrained(root / name)
        if name == "worded":
            sandbox_words().save(root / name)
        merge(root / "run", root / name, root / f"{name}_merged")
    return {name: root / f"{name}_merged" for name in models}


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """Frames of the canvas' size, so that no resizing is compared: a bright square moves over noise."""
    drawn = np.random.default_rng(0).integers(0, 120, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    for number, frame in enumerate(drawn):
        frame[30:70, 20 + 2 * number : 60 + 2 * number] = (230, 60, 40)
    return list(drawn)


def shape() -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[30:70, 20:60] = True
    return mask


def streamed(model: Any, processor: Any, frames: list[np.ndarray], given: dict[int, list[dict]]) -> list[Any]:
    """Masks and scores of every frame by id, and mask logits, as transformers' documentation streams a video."""
    session, found = processor.init_video_session(inference_device="cpu", dtype=torch.float32), []
    for number, frame in enumerate(frames):
        inputs = processor(images=frame, return_tensors="pt")
        added = given.get(number, [])
        for prompt in added:
            processor.add_inputs_to_inference_session(session, frame_idx=number, **prompt)
        session.obj_with_new_inputs = [prompt["obj_ids"] for prompt in added]  # each call sets its own alone
        answer = model(inference_session=session, frame=inputs.pixel_values[0])
        masks = processor.post_process_masks([answer.pred_masks], [(SIDE, SIDE)])[0][:, 0]
        rows = zip(answer.object_ids, masks, answer.object_score_logits.sigmoid().flatten(), strict=True)
        found.append(({o: (mask.numpy(), float(score)) for o, mask, score in rows}, answer.pred_masks))
    return found


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal, but for logits that are 0 up to rounding."""
    assert found.shape == wanted.shape and (found != wanted).mean() < 1e-3


def prompts(kind: str) -> dict[str, Any]:
    if kind == "mask":
        return {"input_masks": shape()}
    if kind == "box":
        return {"input_boxes": [[list(BOX)]], "original_size": (SIDE, SIDE)}
    return {
        "input_points": [[[list(point[:2]) for point in POINTS]]], "input_labels": [[[p[2] for p in POINTS]]],
        "original_size": (SIDE, SIDE),
    }  # fmt: skip


def give(session: Any, kind: str) -> int:
    if kind == "mask":
        return session.add_mask(shape(), "square")
    return session.add_box(BOX, "square") if kind == "box" else session.add_points(POINTS, "square")


@pytest.mark.parametrize("kinds", [("box",), ("mask", "points")])
def test_the_answers_are_those_of_transformers(
    kinds: tuple[str, ...], merged: dict[str, Path], frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second object begins at the fourth frame."""
    processor = AutoProcessor.from_pretrained(merged["tracker"])
    given = {3 * n: [{"obj_ids": n + 1, **prompts(kind)}] for n, kind in enumerate(kinds)}
    reference = Sam3TrackerVideoModel.from_pretrained(merged["tracker"]).eval()
    wanted = streamed(reference, processor, frames, given)
    session = sd.load(merged["tracker"], device="cpu").session(threshold=0.0)
    assert isinstance(session, TrackerSession) and session.context == 7
    answers, run = list[Any](), session._advance
    monkeypatch.setattr(session, "_advance", lambda frame: answers.append(run(frame)) or answers[-1])
    for number, (frame, (there, logits)) in enumerate(zip(frames, wanted, strict=True)):
        if number % 3 == 0 and number // 3 < len(kinds):
            assert give(session, kinds[number // 3]) == number // 3 + 1
        found = session.push(frame)
        assert [one.object_id for one in found] == list(there)
        for one in found:
            mask, score = there[one.object_id]
            assert one.phrase == "square" and one.visible == mask.any() and one.score == pytest.approx(score)
            same(one.mask, mask)
        torch.testing.assert_close(answers[-1].pred_masks, logits, rtol=0, atol=1e-4 * logits.abs().max().item())
        if number > 4:
            assert (answers[-1].pred_masks - answers[-2].pred_masks).abs().max() > 2e-3, "does not depend on the frame"


def test_a_long_video_takes_no_more_memory(merged: dict[str, Path], frames: list[np.ndarray]) -> None:
    session = TrackerSession(load_tracker(merged["tracker"]))
    session.add_mask(shape())
    kept = [session.push(frame) and session.memory_bytes for frame in frames + frames]
    assert kept[0] < kept[5] < kept[15] == kept[-1]
    assert not any(pixels is not None for pixels in session._session.processed_frames.values())
    cells, pointers = 9 * 9 * 64, 128 * 4  # memory features are bfloat16, their positions float32
    assert kept[0] == cells * (2 + 4) + pointers + 4


def test_words_find_what_transformers_finds(
    merged: dict[str, Path], frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_sam3_video, "cv_utils_kernel", False)
    reference = Sam3VideoModel.from_pretrained(merged["worded"]).eval()
    processor, words = AutoProcessor.from_pretrained(merged["worded"]), sandbox_words()
    theirs = processor.init_video_session(inference_device="cpu", dtype=torch.float32)
    number = theirs.add_prompt("red circle")
    theirs.prompt_input_ids[number], theirs.prompt_attention_masks[number] = words.encode(["red circle"])
    session = sd.load(merged["worded"], device="cpu").session(words=True, threshold=0.0)
    assert isinstance(session, WordSession)
    session.add_text("red circle")
    shown = 0
    for frame in frames[:6]:
        inputs = processor(images=frame, return_tensors="pt")
        answer = reference(inference_session=theirs, frame=inputs.pixel_values[0])
        wanted = processor.postprocess_outputs(theirs, answer, original_sizes=[[SIDE, SIDE]])
        masks = {int(i) + 1: mask.numpy() for i, mask in zip(wanted["object_ids"], wanted["masks"], strict=True)}
        found = {one.object_id: one for one in session.push(frame)}
        assert found.keys() == masks.keys() and {one.phrase for one in found.values()} <= {"red circle"}
        for object_id, one in found.items():
            same(one.mask, masks[object_id])
            shown += one.visible
    assert shown


def test_one_video_through_every_interface(
    merged: dict[str, Path], frames: list[np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from samdistill.cli import main

    film = tmp_path / "film"
    film.mkdir()
    for number, frame in enumerate(frames[:4]):
        Image.fromarray(frame).resize((100, 60)).save(film / f"{number}.png")
    model = sd.load(merged["worded"], device="cpu")
    seen = [frame.objects[0].mask.shape for frame in model.track(film, boxes=[(5, 5, 40, 40)])]
    assert seen == [(60, 100)] * 4
    for prompt in ({"points": [(20, 20)]}, {"text": "red circle"}):
        found = sd.predict_video(film, merged["worded"], progress=False, **prompt)
        assert (found.frames, found.context) == (4, 7)
    for path, asked in ((merged["tracker"], "--point=20,20"), (merged["worded"], "--text=red circle")):
        assert main(["predict", str(film), str(path), asked]) == 0
        assert "in 4 frames, memory of 7" in capsys.readouterr().out


def test_it_is_evaluated_on_videos(merged: dict[str, Path], films: Path) -> None:
    """Against a session of its own, whose masks are compared by hand."""
    result = sd.load(merged["tracker"], device="cpu").evaluate(films, videos=1, progress=False)
    assert result.names == ["student"] and result.row("student").kept is None
    source = SavSource(films / "val")
    key = source.keys[0]
    record, session, shares = source.record(key), TrackerSession(load_tracker(merged["tracker"])), list[list[float]]()
    starts = record.visible.argmax(0)
    for row, (index, frame) in enumerate(zip(record.annotated, source.frames(key, record.annotated), strict=True)):
        truth = source.masks(key, index)
        for column in np.flatnonzero(starts == row):
            session.add_mask(truth[column], object_id=record.objects[column])
        found = {one.object_id: one.mask for one in session.push(frame)}
        for column, number in enumerate(record.objects):
            if starts[column] < row < len(record.annotated) - 1:  # the given frame and the last one do not count
                both = (truth[column] & found[number]).sum(), (truth[column] | found[number]).sum()
                shares.append([column, both[0] / both[1] if both[1] else 1.0])
    means = [np.mean([j for column, j in shares if column == one]) for one in sorted({int(c) for c, _ in shares})]
    assert result.row("student").j == pytest.approx(np.mean(means), abs=1e-6)
    with pytest.raises(UserError, match="a SAM's own memory holds no maps of a teacher"):
        sd.evaluate_videos(merged["tracker"], films, teacher="sandbox", progress=False)


def test_what_cannot_track_says_so_in_one_line(merged: dict[str, Path], tmp_path: Path) -> None:
    session = TrackerSession(load_tracker(merged["tracker"]))
    with pytest.raises(UserError, match="a Sam3TrackerVideoModel takes no words in a video; give --box or --point"):
        load_worded(merged["tracker"])
    with pytest.raises(UserError, match="takes no words in a video"):
        session.add_text("dog")
    with pytest.raises(UserError, match="at least one point inside"):
        session.add_points([(3, 4, 0)])
    session.add_points([(3, 400)])
    with pytest.raises(UserError, match="--point: 3,400 is outside the image, which is 126 x 126 pixels"):
        session.push(np.zeros((SIDE, SIDE, 3), np.uint8))
    assert session.push(np.zeros((SIDE, SIDE, 3), np.uint8)) == ()  # the prompt is discarded
    with pytest.raises(UserError, match="only a SAM with a memory follows an object from points"):
        sd.load("sandbox-student", device="cpu").session().add_points([(3, 4)])
    words = WordSession(load_worded(merged["worded"]))
    words.add_mask(shape())
    with pytest.raises(UserError, match="a session in words takes no boxes and masks"):
        words.push(np.zeros((SIDE, SIDE, 3), np.uint8))
    for path in ("sandbox", "sandbox-sam"):
        with pytest.raises(UserError, match="no memory in it, so it cannot track"):
            sd.load(path, device="cpu").session()
        with pytest.raises(UserError, match="no memory of a SAM 2 or a SAM 3 in it"):
            load_tracker(path)


def test_a_sam_2_tracks_too(frames: list[np.ndarray], tmp_path: Path) -> None:
    from test_sam2_hosting import video_config as sam2_config

    model = scrambled(Sam2VideoModel(sam2_config()), 0)
    model.save_pretrained(tmp_path)
    sd.checkpoints.processors.write_processor(tmp_path)
    small = [frame[:64, :64].copy() for frame in frames]
    processor = AutoProcessor.from_pretrained(tmp_path)
    session = sd.load(tmp_path, device="cpu").session(threshold=0.0)
    session.add_box((10, 10, 50, 40))
    theirs = processor.init_video_session(inference_device="cpu", dtype=torch.float32)
    for number, frame in enumerate(small):
        inputs = processor(images=frame, return_tensors="pt")
        if not number:
            processor.add_inputs_to_inference_session(
                theirs, frame_idx=0, obj_ids=1, input_boxes=[[[10, 10, 50, 40]]], original_size=frame.shape[:2]
            )
        answer = model(inference_session=theirs, frame=inputs.pixel_values[0])
        masks = processor.post_process_masks([answer.pred_masks], [frame.shape[:2]])[0]
        same(session.push(frame)[0].mask, masks[0, 0].numpy())


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
