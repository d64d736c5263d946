"""Objects keep their ids through a video, and a session its size; with a stand-in and with a random student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from colour_model import GRID, MEMORY, ColourModel, picture, session, square, where
from PIL import Image

from samdistill.checkpoints.student import load_with_memory
from samdistill.inference.concepts import StudentDetector, ask_image
from samdistill.inference.video import VideoSession
from samdistill.ops.sights import MOST_OBJECTS, SAME
from samdistill.sandbox.concepts import VOCABULARY, sandbox_words
from samdistill.students import EfficientSam3Model, efficient_sam3_config
from samdistill.types import UserError


def spans(session: VideoSession) -> tuple[int, int]:
    """How many arrays a session holds, and their bytes, wherever they are; its model aside."""
    seen, todo, arrays = set(), [vars(session)], []
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, StudentDetector | ColourModel | EfficientSam3Model):
            continue
        seen.add(id(value))
        if isinstance(value, np.ndarray | torch.Tensor):
            arrays.append(value.nbytes)
        elif isinstance(value, dict):
            todo += value.values()
        elif hasattr(value, "__dict__"):
            todo.append(vars(value))
        elif hasattr(value, "__iter__") and not isinstance(value, str):
            todo += list(value)
    return len(arrays), sum(arrays)


def test_ids_stay_where_objects_cross_and_one_hides_the_other() -> None:
    """Along one line, the red one behind: at column 28 nothing of it is to be seen."""
    watched, model = session(stride=1)
    watched.add_text("thing")
    seen = [where(watched.push(picture(red=(20, 4 * t), green=(20, 56 - 4 * t)))) for t in range(15)]
    assert seen[0] == {1: (20, 0), 2: (20, 56)}
    assert [corner[2] for corner in seen] == [(20, 56 - 4 * t) for t in range(15)]
    assert seen[7][1] is None and seen[14][1] == (20, 56)
    assert seen[6][1] == (20, 24) and seen[6][2] == (20, 32)
    assert model.encoded == 15 and model.read == 1


def test_without_memory_ids_go_with_the_overlap_whatever_the_order_of_the_answers() -> None:
    watched, _ = session(context=0)
    watched.add_text("thing")
    seen = [where(watched.push(picture(red=(10, 4 * t), blue=(30, 56 - 4 * t)))) for t in range(15)]
    assert seen == [{1: (10, 4 * t), 2: (30, 56 - 4 * t)} for t in range(15)]


def test_an_object_that_left_comes_back_under_its_id() -> None:
    watched, model = session()
    watched.add_mask(square(10, 10), "red", object_id=7)
    watched.push(picture(red=(10, 10)))
    for _ in range(3):
        (gone,) = watched.push(picture())
        assert not gone.visible and not gone.mask.any() and gone.box == (0, 0, 0, 0) and gone.score < 0.5
    (back,) = watched.push(picture(red=(40, 40)))
    assert (back.object_id, back.visible, back.phrase, back.box) == (7, True, "red", (40, 40, 48, 48))
    assert np.array_equal(back.mask, square(40, 40)) and back.score > 0.9
    assert all(call["memory_masks"] is not None for call in model.calls)


def test_the_frame_that_shows_an_object_last_stays_and_finds_it_again() -> None:
    """Three frames are kept, each second one; the object was there in the first only."""
    watched, model = session()
    watched.add_mask(square(10, 10))
    watched.push(picture(red=(10, 10)))
    for _ in range(20):
        watched.push(picture())
    assert where(watched.push(picture(red=(14, 10)))) == {1: (14, 10)}
    asked = model.calls[-1]
    assert asked["memory_ages"].tolist() == [[3.0, 1.5, 0.5]]  # frame 0 counts as the oldest there is; 18 and 20
    assert asked["memory_masks"][0].flatten(1).any(1).tolist() == [True, False, False]


def test_what_no_remembered_frame_shows_is_not_asked_about() -> None:
    """One of three frames may wait for what it shows; of two that are needed the older one leaves."""
    watched, model = session()
    watched.add_mask(square(10, 10))
    watched.push(picture(red=(10, 10)))
    watched.push(picture())
    watched.add_mask(square(40, 40))
    watched.push(picture(green=(40, 40)))
    for _ in range(6):
        watched.push(picture())
    found = where(watched.push(picture(red=(10, 10), green=(40, 40))))
    assert found == {1: None, 2: (40, 40)} and len(model.calls[-1]["memory_masks"]) == 1


def test_what_was_lost_is_found_again_by_its_phrase_under_the_nearest_id() -> None:
    watched, _ = session(ColourModel(context=1))  # a single frame waits for nobody
    watched.add_text("thing")
    assert where(watched.push(picture(red=(4, 4), green=(50, 50)))) == {1: (4, 4), 2: (50, 50)}
    for _ in range(8):
        assert set(where(watched.push(picture())).values()) == {None}
    assert where(watched.push(picture(green=(40, 44)))) == {1: None, 2: None}  # frame 9: not asked
    assert where(watched.push(picture(green=(40, 44)))) == {1: None, 2: (40, 44)}  # frame 10
    assert where(watched.push(picture(green=(44, 44)))) == {1: None, 2: (44, 44)}  # by memory again
    watched.push(picture(green=(44, 44), red=(0, 20), blue=(30, 0)))
    again = where(watched.push(picture(green=(44, 44), red=(0, 20), blue=(30, 0))))
    assert set(again) == {1, 2, 3} and {again[1], again[3]} == {(0, 20), (30, 0)}


def test_new_instances_of_a_phrase_are_looked_for_where_frames_are_remembered() -> None:
    watched, model = session()
    assert watched.push(picture(red=(0, 0))) == () and model.calls == []  # nothing is asked yet
    watched.add_text("red")
    watched.add_text("red")
    reds = [(0, 0), (20, 20)]
    assert where(watched.push(picture(red=reds[:1]))) == {1: (0, 0)}  # at once, in frame 1
    assert len(model.calls) == 1 and model.calls[0]["memory_features"] is None
    assert set(where(watched.push(picture(red=reds)))) == {1, 2}  # frame 2
    reds.append((40, 40))
    assert set(where(watched.push(picture(red=reds, blue=(4, 50))))) == {1, 2}
    assert set(where(watched.push(picture(red=reds, blue=(4, 50))))) == {1, 2, 3}
    assert {one.phrase for one in watched.push(picture(red=reds))} == {"red"}


def test_two_answers_about_one_thing_are_one_object() -> None:
    class Twice(ColourModel):
        def claimed(self, pixels, row):
            (found,) = super().claimed(pixels, row)
            smaller = found.clone()
            smaller[: int((found > 0).any(1).nonzero().min()) + 2] = -5  # IoU 6 / 8
            return [found, smaller]

    watched, _ = session(Twice())
    watched.add_text("red")
    assert where(watched.push(picture(red=(8, 8)))) == {1: (8, 8)} and SAME < 6 / 8


def test_a_session_has_so_many_objects_and_no_more() -> None:
    corners = [(12 * row, 12 * column) for row in range(5) for column in range(5)]
    watched, _ = session()
    watched.add_text("red")
    assert len(watched.push(picture(red=corners[:MOST_OBJECTS]))) == MOST_OBJECTS and not watched.crowded
    assert len(watched.push(picture(red=corners[:24]))) == MOST_OBJECTS and not watched.crowded
    assert len(watched.push(picture(red=corners[:24]))) == MOST_OBJECTS and watched.crowded
    with pytest.raises(UserError, match="at most 20 objects"):
        watched.add_mask(square(0, 0))


def test_nothing_grows_with_the_video() -> None:
    watched, model = session(ColourModel(context=4))
    watched.add_text("thing")
    held = []
    for t in range(60):
        watched.push(picture(red=(t % 40, 4), green=(30, t % 50), blue=(50 - t % 40, 50)))
        held.append(spans(watched))
    assert len(set(held[8:])) == 1 and held[8][1] > held[0][1]
    sizes = [tuple(call["memory_features"].shape) for call in model.calls if call["memory_features"] is not None]
    assert set(sizes[8:]) == {(1, 4, 3, GRID, GRID)} and len(sizes) == 59 and model.encoded == 60 and model.read == 1


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudentDetector, StudentDetector]:
    """A student of images and the same with a memory, every tensor random."""
    text = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 2, "projection_dim": 32}  # fmt: skip
    model = EfficientSam3Model(efficient_sam3_config("efficientvit_b0", 126, 32, 2, 64, 1, 1, 5, text)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    folder = tmp_path_factory.mktemp("student")
    model.save_pretrained(folder)
    sandbox_words().save(folder)
    torch.manual_seed(0)
    video = load_with_memory(folder, latents=12, layers=1, windows=2).eval()
    return StudentDetector(model, sandbox_words()), StudentDetector(video, sandbox_words())


def noise(number: int, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def spied(monkeypatch: pytest.MonkeyPatch, student: StudentDetector) -> list[tuple[dict[str, Any], Any]]:
    calls: list[tuple[dict[str, Any], Any]] = []
    real: Callable[..., Any] = student.model.forward_video

    def spy(*args: Any, **asked: Any) -> Any:
        calls.append((asked, real(*args, **asked)))
        return calls[-1][1]

    monkeypatch.setattr(student.model, "forward_video", spy)
    return calls


@pytest.mark.parametrize("which", [0, 1])
def test_without_memory_the_answer_is_the_image_models_bit_for_bit(which, students, monkeypatch) -> None:
    student, frame = students[which], noise(0)
    expected = ask_image(student, Image.fromarray(frame), "red circle", threshold=0)
    calls = spied(monkeypatch, student)
    watched = VideoSession(student, context=0, threshold=0)
    watched.add_text("red circle")
    for _ in range(2):
        found = watched.push(frame)
        assert len(found) > 0
        for one in found:
            row = expected.scores.tolist().index(one.score)
            assert np.array_equal(one.mask, expected.masks[row].numpy())
    assert len(calls) == 2 and all(asked[name] is None for asked, _ in calls for name in MEMORY)
    monkeypatch.undo()
    asked, answer = calls[0]
    ids, mask = student.words.encode(["red circle"])
    with torch.no_grad():
        plain = student.model(input_ids=ids, attention_mask=mask, vision_embeds=asked["vision_embeds"])
    names = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
    assert all(torch.equal(answer[name], plain[name]) for name in names)


@pytest.mark.parametrize("marks", [True, False])
def test_a_student_with_memory_follows_with_constant_memory(marks, students, monkeypatch) -> None:
    student = students[1]
    monkeypatch.setattr(student.model.config, "memory_marks", marks)
    calls, encoded = spied(monkeypatch, student), []
    handle = student.model.vision_encoder.register_forward_pre_hook(lambda _, args: encoded.append(args[0]))
    watched = VideoSession(student, context=3, stride=2, threshold=0)
    watched.add_box((5, 5, 20, 30))
    watched.add_mask(noise(1)[..., 0] > 200, "star")
    held = []
    for number in range(12):
        found = watched.push(noise(number))
        assert [one.object_id for one in found] == [1, 2] and not any(one.mask.dtype != bool for one in found)
        assert all(one.visible == one.mask.any() for one in found)
        if marks and number:
            assert not (found[0].mask & found[1].mask).any()
        held.append(spans(watched))
    handle.remove()
    assert len(encoded) == 12 and len(set(held[5:])) == 1
    asked, answer = calls[-1]
    assert asked["memory_features"].shape == (1, 3, 32, 4, 4) and asked["memory_ages"].tolist() == [[2.5, 1.5, 0.5]]
    assert (asked["memory_masks"] is not None) == marks and not answer.pred_masks.requires_grad
    level = asked["memory_features"][0, -1]
    with torch.no_grad():
        again = student.model.get_vision_features(encoded[10]).fpn_hidden_states[3][0]
    assert torch.equal(level, again)
