"""The standalone file follows a video with the rules and the ids of ``VideoSession``."""

from __future__ import annotations

import numpy as np
import pytest
from colour_files import exported
from colour_model import ColourModel, picture, session, square
from scipy.optimize import linear_sum_assignment

from samdistill.deployment.runtime import ModelError
from samdistill.deployment.runtime.video import assign


def scenario(seed: int, frames: int = 16) -> list[tuple[np.ndarray, list[tuple[str, tuple]]]]:
    """Squares that come, move, cross and leave, with objects and phrases added on the way."""
    rng = np.random.default_rng(seed)
    starts, speeds = rng.integers(0, 50, (6, 2)), rng.integers(-4, 5, (6, 2))
    lives = np.sort(rng.integers(0, frames, (6, 2)), 1)
    lives[:3, 0] = 0
    found = []
    for number in range(frames):
        squares: dict[str, list[tuple[int, int]]] = {}
        for index, (start, speed, (first, last)) in enumerate(zip(starts, speeds, lives, strict=True)):
            if first <= number <= last:
                top, left = np.clip(start + speed * number, 0, 56)
                squares.setdefault(("red", "green", "blue")[index % 3], []).append((int(top), int(left)))
        calls: list[tuple[str, tuple]] = []
        if rng.random() < 0.2 or not number:
            calls.append(("add_text", (("red", "green", "thing")[rng.integers(3)],)))
        if squares and rng.random() < 0.2:
            top, left = next(iter(squares.values()))[0]
            calls.append(("add_box", ((left, top, left + 8, top + 8), (None, "red", "green")[rng.integers(3)])))
        if squares and rng.random() < 0.2:
            calls.append(("add_mask", (square(*next(iter(squares.values()))[-1]), None)))
        found.append((picture(**squares), calls))
    return found


@pytest.mark.parametrize("memory", [{}, {"context": 0}, {"marks": False}, {"context": 2, "stride": 1}])
def test_ids_masks_and_scores_are_those_of_a_session(memory: dict[str, int]) -> None:
    seen = 0
    for seed in range(4):
        theirs, _ = session(ColourModel(**memory))
        own = exported(ColourModel(**memory)).video()
        for frame, calls in scenario(seed):
            for name, given in calls:
                assert getattr(theirs, name)(*given) == getattr(own, name)(*given)
            wanted, found = theirs.push(frame), own.push(frame)
            assert [(o.object_id, o.phrase, o.visible, o.box) for o in wanted] == [
                (o.object_id, o.phrase, o.visible, o.box) for o in found
            ]
            for one, other in zip(wanted, found, strict=True):
                assert np.array_equal(one.mask, other.mask) and one.score == pytest.approx(other.score, abs=1e-6)
            seen += sum(one.visible for one in wanted)
        assert theirs.crowded == own.crowded
    assert seen > 20


def test_a_memory_of_fixed_length_is_padded_with_frames_that_are_not_valid() -> None:
    free, fixed = exported(ColourModel()).video(), exported(ColourModel(), length=3).video()
    for frame, calls in scenario(1):
        for video in (free, fixed):
            for name, given in calls:
                getattr(video, name)(*given)
        for one, other in zip(free.push(frame), fixed.push(frame), strict=True):
            assert one.object_id == other.object_id and np.array_equal(one.mask, other.mask)


def test_memory_does_not_grow_with_the_video() -> None:
    video = exported(ColourModel(context=4, stride=1)).video()
    video.add_text("thing")
    sizes = []
    for number in range(60):
        video.push(picture(red=(number % 50, 10), green=(30, number % 40)))
        sizes.append((len(video._past), len(video._tracks), len(video._model._concepts)))
    assert set(sizes[20:]) == {(4, len(video._tracks), 1)}


@pytest.mark.parametrize("levels", [2, 4, 10**6])
def test_the_assignment_is_that_of_scipy_also_between_equal_sums(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for _ in range(30):
        gains = rng.integers(0, levels, rng.integers(1, 21, 2)) / levels
        rows, columns = linear_sum_assignment(gains, maximize=True)
        assert sorted(assign(gains)) == list(zip(rows.tolist(), columns.tolist(), strict=True))


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    video = exported(ColourModel()).video()
    with pytest.raises(ModelError, match="reaches beyond the image, which is 64 x 64 pixels"):
        video.add_box((0, 0, 65, 10))
        video.push(picture(red=(0, 0)))
    video.push(picture(red=(0, 0)))
    with pytest.raises(ModelError, match=r"frame 1 is 32 x 32 pixels, the first one 64 x 64"):
        video.push(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ModelError, match="the mask of object 1 is 5 x 4 pixels, the frame 64 x 64"):
        video.add_mask(np.ones((4, 5), bool))
    for _ in range(20):
        video.add_mask(square(3, 3))
    with pytest.raises(ModelError, match="a video has at most 20 objects"):
        video.add_mask(square(3, 3))
