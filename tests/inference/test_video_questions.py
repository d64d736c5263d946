"""What a session tells the model about the past, how objects are shown to it, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from colour_model import GRID, MEMORY, SIDE, ColourModel, picture, session, square, where

from samdistill.sandbox.concepts import VOCABULARY, sandbox_words
from samdistill.types import UserError


def shares(mask: np.ndarray) -> torch.Tensor:
    cell = SIDE // GRID
    return torch.from_numpy(mask.reshape(GRID, cell, GRID, cell).mean((1, 3))).float()


def test_the_memory_is_what_a_hand_computation_says() -> None:
    """Stride 2, three frames. A green object comes in frame 3, which is remembered for it out of turn."""
    watched, model = session()
    red, green = [(5 + t, 10 + 2 * t) for t in range(6)], [(30, 40 + t) for t in range(6)]
    frames = [picture(red=red[t], green=green[t]) for t in range(6)]
    maps = [torch.from_numpy(f.reshape(8, 8, 8, 8, 3).mean((1, 3)) / 255).permute(2, 0, 1).float() for f in frames]
    watched.add_mask(square(*red[0]), object_id=5)
    for number, frame in enumerate(frames):
        if number == 3:
            watched.add_mask(square(*green[3]), "star")
        watched.push(frame)
    expected = {1: [0], 2: [0], 3: [0, 2], 4: [0, 2, 3], 5: [2, 3, 4]}
    assert len(model.calls) == len(expected)
    for (number, past), told in zip(expected.items(), model.calls, strict=True):
        assert told["memory_ages"].tolist() == [[(number - one) / 2 for one in past]]
        assert told["memory_valid"].tolist() == [[True] * len(past)]
        torch.testing.assert_close(told["memory_features"], torch.stack([maps[one] for one in past])[None])
        marks = [torch.stack([shares(square(*red[one])) for one in past])]
        if number > 3:  # the second object: in no frame before it came
            nowhere = torch.zeros(GRID, GRID)
            marks.append(torch.stack([shares(square(*green[one])) if one >= 3 else nowhere for one in past]))
        torch.testing.assert_close(told["memory_masks"], torch.stack(marks))
        assert told["prompt_images"].tolist() == [0] * len(marks) and told["input_boxes"] is None
        words, mask = sandbox_words().encode(["thing", "star"][: len(marks)])
        assert torch.equal(told["text_embeds"].pooler_output[..., 0].long(), words)
        assert torch.equal(told["attention_mask"], mask)


def test_a_frame_in_which_an_object_is_invisible_has_no_mark_of_it() -> None:
    watched, model = session(stride=1)
    watched.add_mask(square(8, 8))
    for frame in (picture(red=(8, 8)), picture(), picture(red=(16, 16)), picture()):
        watched.push(frame)
    marks = model.calls[-1]["memory_masks"][0]
    assert torch.equal(marks.flatten(1).sum(1), torch.tensor([1.0, 0.0, 1.0])) and marks[2, 2, 2] == 1


def test_a_pixel_belongs_to_the_surer_object() -> None:
    class Greedy(ColourModel):
        """The first object claims columns 0 to 47, the second those from 32 on, and surer; a third all, without being
        visible."""

        def claimed(self, pixels, row):
            claims = torch.full((3, SIDE, SIDE), -5.0)
            claims[0, :, :48], claims[1, :, 32:], claims[2] = 3.0, 5.0, 9.0
            return [claims[row]]

        def forward_video(self, **asked):
            output = super().forward_video(**asked).answer()
            output.presence_logits[2:] = -6
            return SimpleNamespace(answer=lambda: output)

    watched, _ = session(Greedy())
    for left in (0, 16, 32):
        watched.add_mask(square(0, left))
    assert [one.visible for one in watched.push(picture())] == [True] * 3
    left, right, hidden = watched.push(picture())
    assert left.box == (0, 0, 32, 64) and right.box == (32, 0, 64, 64) and not hidden.visible
    assert not (left.mask & right.mask).any() and 0 < hidden.score < 0.5


@pytest.mark.parametrize("memory", [{"latents": 0}, {"marks": True}])
def test_without_memory_nothing_is_remembered(memory: dict[str, Any]) -> None:
    watched, model = session(ColourModel(**memory), context=None if "latents" in memory else 0)
    watched.add_text("red")
    watched.add_mask(square(30, 30))
    for t in range(5):
        found = watched.push(picture(red=(2 * t, 2 * t), green=(30, 30 + t)))
    assert where(found) == {1: (30, 34), 2: (8, 8)} and watched.context == 0
    assert len(model.calls) == 5  # "red" is asked once a frame, for those that are there and those that are new
    assert all(call[name] is None for call in model.calls for name in MEMORY)


def test_a_memory_without_marks_is_asked_by_phrase() -> None:
    watched, model = session(ColourModel(marks=False))
    watched.add_mask(square(0, 0))
    watched.add_text("blue")
    for t in range(4):
        found = watched.push(picture(red=(2 * t, 0), blue=[(20, 40 - t), (50, 3 * t)]))
    assert where(found)[1] == (6, 0) and sorted(where(found).values()) == [(6, 0), (20, 37), (50, 9)]
    told = [call for call in model.calls if call["memory_features"] is not None]
    assert len(told) == 3 and all(call["memory_masks"] is None for call in model.calls)
    assert told[-1]["memory_ages"].tolist() == [[1.5, 0.5]]
    assert told[-1]["text_embeds"].pooler_output[:, 1, 0].tolist() == [VOCABULARY.index("thing"), VOCABULARY.index("blue")]  # noqa: E501  # fmt: skip


def test_a_given_map_is_remembered_on_the_students_grid() -> None:
    watched, model = session()
    watched.add_mask(square(0, 0))
    given = torch.arange(3.0)[:, None, None].expand(3, 11, 11)  # a teacher's grid is another
    watched.push(picture(red=(0, 0)), given)
    watched.push(picture(red=(0, 0)), torch.zeros(3, 8, 8))  # frame 1 is not remembered
    watched.push(picture(red=(0, 0)))
    watched.push(picture(red=(0, 0)))
    first, second = model.calls[-1]["memory_features"][0]
    torch.testing.assert_close(first, torch.arange(3.0)[:, None, None].expand(3, GRID, GRID))
    assert second[0, 0, 0] == 1
    with pytest.raises(ValueError, match="must have shape"):
        watched.push(picture(), torch.zeros(4, 8, 8))


def test_a_box_is_shown_as_an_example_and_its_instance_taken() -> None:
    watched, model = session()
    first, second = watched.add_box((9, 11, 17, 19)), watched.add_box((30, 40, 38, 48), "green")
    frame = picture(red=[(10, 10), (10, 40)], green=(40, 30))
    found = watched.push(frame)
    assert where(found) == {first: (10, 10), second: (40, 30)} and found[0].score == pytest.approx(0.975, abs=0.02)
    assert [one.phrase for one in found] == [None, "green"]
    (call,) = model.calls
    assert call["input_boxes_labels"].tolist() == [[1], [1]]
    assert call["input_boxes"][0].tolist() == [[13 / 64, 15 / 64, 8 / 64, 8 / 64]]
    assert torch.equal(call["text_embeds"].pooler_output[..., 0].long(), sandbox_words().encode(["visual", "green"])[0])
    watched.push(frame)
    ids = model.calls[-1]["text_embeds"].pooler_output[..., 0].long()
    assert torch.equal(ids, sandbox_words().encode(["thing", "green"])[0])  # what it is called from then on


def test_a_box_around_nothing_known_is_its_own_mask() -> None:
    watched, _ = session()
    watched.add_box((20.5, 30, 27.2, 41))
    (found,) = watched.push(picture(red=(10, 10)))
    assert found.visible and found.box == (20, 30, 28, 41) and found.mask.sum() == 8 * 11


def test_masks_are_taken_as_they_are_and_may_overlap() -> None:
    watched, model = session()
    rng = np.random.default_rng(0)
    masks = [rng.random((SIDE, SIDE)) > 0.5 for _ in range(2)]
    for mask in masks:
        watched.add_mask(mask)
    found = watched.push(picture())
    assert all(np.array_equal(one.mask, mask) for one, mask in zip(found, masks, strict=True)) and not model.calls


@pytest.mark.parametrize("geometry", ["square", "longest_side"])
def test_masks_come_back_in_the_pixels_of_the_frame(geometry: str) -> None:
    watched, model = session(geometry=geometry)
    frame = np.zeros((32, 128, 3), np.uint8)
    frame[8:24, 16:48, 0] = 255
    box = watched.add_box((16, 8, 48, 24), "red")
    watched.add_text("red")
    shown = watched.push(frame)
    assert len(shown) == 1 and shown[0].object_id == box  # the phrase finds no second one
    height = 64 if geometry == "square" else 16
    assert model.calls[0]["input_boxes"][0, 0].tolist() == [0.25, 0.5 * height / 64, 0.25, 0.5 * height / 64]
    (found,) = watched.push(frame)
    assert found.mask.shape == (32, 128) and found.box == pytest.approx((16, 8, 48, 24), abs=1)
    marks = model.calls[-1]["memory_masks"][0, 0]
    assert marks.sum() == pytest.approx(height / 64 * 0.125 * 64, rel=0.15)  # an eighth of what it covers of the canvas


def test_what_cannot_be_followed_is_refused() -> None:
    watched, _ = session()
    for settings, complaint in (
        ({"context": -1}, "got -1 and"), ({"stride": 0}, "and 0"), ({"threshold": 1.5}, "threshold 1.5"),
        ({"geometry": "round"}, "unknown geometry 'round'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=complaint):
            session(**settings)
    with pytest.raises(UserError, match="empty; give a noun phrase"):
        watched.add_text(" ")
    for ask in (watched.add_text, lambda text: watched.add_box((0, 0, 9, 9), text),
                lambda text: watched.add_mask(square(0, 0), text)):  # fmt: skip
        with pytest.raises(UserError, match="longer than the 6 tokens"):
            ask("red red red red red star")
    with pytest.raises(UserError, match="the mask is empty"):
        watched.add_mask(np.zeros((SIDE, SIDE), bool))
    for wrong in (np.zeros((SIDE, SIDE), np.uint8), np.ones((1, SIDE, SIDE), bool), [[True]]):
        with pytest.raises(UserError, match="bool array"):
            watched.add_mask(wrong)  # type: ignore[arg-type]
    watched.add_mask(square(0, 0), object_id=3)
    with pytest.raises(UserError, match="object id 3 is in use"):
        watched.add_mask(square(0, 0), object_id=3)
    assert watched.add_mask(square(0, 0)) == 1
    watched.push(picture())
    with pytest.raises(UserError, match="object id 3 is in use"):
        watched.add_mask(square(0, 0), object_id=3)


def test_what_does_not_fit_the_frames_is_refused() -> None:
    watched, model = session()
    for frame in (picture()[..., :2], picture().astype(np.float32), picture()[0], [[1]]):
        with pytest.raises(UserError, match="frame 0 must be a uint8 array"):
            watched.push(frame)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no pixel"):
        watched.push(picture()[:0])
    small, wide = np.ones((10, 12), bool), (0.0, 0.0, 65.0, 9.0)
    watched.add_mask(small)
    with pytest.raises(UserError, match="mask of object 1 is 12 x 10 pixels, the frame 64 x 64"):
        watched.push(picture())
    watched.add_box(wide)
    with pytest.raises(UserError, match="reaches beyond the image, which is 64 x 64"):
        watched.push(picture())
    assert model.encoded == 0 and watched.push(picture()) == ()  # what did not fit is forgotten
    with pytest.raises(UserError, match="12 x 10 pixels, the frame 64 x 64"):
        watched.add_mask(small)
    for box in (wide, (5, 5, 5, 9), (float("nan"), 0, 9, 9)):
        with pytest.raises(UserError, match="--box"):
            watched.add_box(box)
    with pytest.raises(UserError, match="frame 1 is 60 x 32 pixels, the first one 64 x 64"):
        watched.push(picture()[:32, :60])
    assert watched.push(picture()) == () and watched.add_mask(square(0, 0)) == 1
