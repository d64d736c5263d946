"""J, F and J&F of frames, objects, videos and many videos."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from itertools import product

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from samdistill.metrics.video import (
    LoadObjects,
    ObjectMasks,
    VideoFailure,
    boundary,
    boundary_f,
    boundary_tolerance,
    evaluate_object,
    region_similarity,
    score_video,
    score_videos,
)
from samdistill.metrics.video_frames import DAVIS_2017, SAV, VideoConvention, visibility_flags

EVERY = VideoConvention("every", skip_first=False, skip_last=False, from_first_frame=False)


def disc(height: int, width: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Random squares of 3 x 3, or single pixels, from nearly none to nearly all."""
    size = int(rng.choice([1, 3]))
    coarse = rng.random((height // size + 1, width // size + 1)) < rng.random()
    return coarse.repeat(size, 0).repeat(size, 1)[:height, :width]


def f_from_the_definition(predicted: np.ndarray, truth: np.ndarray, radius: int) -> float:
    """Pixel by pixel, in sets and loops."""

    def outline(mask: np.ndarray) -> set[tuple[int, int]]:
        height, width = mask.shape
        return {
            (y, x)
            for y, x in product(range(height), range(width))
            if any(
                y + dy < height and x + dx < width and mask[y + dy, x + dx] != mask[y, x]
                for dy, dx in ((0, 1), (1, 0), (1, 1))
            )
        }

    def share(points: set[tuple[int, int]], others: set[tuple[int, int]]) -> float:
        near = [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others) for y, x in points]
        return sum(near) / len(near) if near else 1.0

    precision, recall = share(outline(predicted), outline(truth)), share(outline(truth), outline(predicted))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_f_equals_the_definition() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        height, width = rng.integers(1, 15, 2)
        predicted, truth = blobs(rng, height, width), blobs(rng, height, width)
        bound_th = float(rng.choice([0.01, 0.1, 0.2, 0.4]))
        radius = math.ceil(bound_th * math.hypot(height, width))
        expected = f_from_the_definition(predicted, truth, radius)
        assert boundary_f(predicted, truth, bound_th) == pytest.approx(expected, abs=1e-12)
        seen.add(expected)
    assert {0.0, 1.0} < seen and len(seen) > 20


@pytest.mark.parametrize("size", [(90, 120), (480, 854)])
def test_f_equals_dilation_with_a_disk(size: tuple[int, int]) -> None:
    radius = boundary_tolerance(*size)
    offsets = np.arange(-radius, radius + 1)
    footprint = offsets[:, None] ** 2 + offsets**2 <= radius**2
    rng = np.random.default_rng(1)
    for predicted, truth in [
        (rng.random(size) < 0.05 / radius**2, rng.random(size) < 0.05 / radius**2),
        (disc(*size, 60, 40, 30), disc(*size, 60 + radius, 40 + radius, 30)),
        (disc(*size, 0, 0, 50), disc(*size, radius, radius, 50)),  # over the edge of the image
    ]:
        found, wanted = boundary(predicted), boundary(truth)
        precision = (found & binary_dilation(wanted, footprint)).sum() / found.sum()
        recall = (wanted & binary_dilation(found, footprint)).sum() / wanted.sum()
        assert 0 < precision < 1 and 0 < recall < 1
        assert boundary_f(predicted, truth) == 2 * precision * recall / (precision + recall)


def test_boundary_by_hand() -> None:
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 2:4] = True
    drawn = [[0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    assert boundary(mask).astype(int).tolist() == drawn
    assert (boundary(mask) == boundary(~mask)).all()
    assert not boundary(np.ones((4, 5), dtype=bool)).any()  # outside the image is no neighbour
    left = np.arange(5) < 2
    assert boundary(np.tile(left, (4, 1))).astype(int).tolist() == [[0, 1, 0, 0, 0]] * 4


@pytest.mark.parametrize(
    ("size", "radius"), [((480, 854), 8), ((848, 480), 8), ((300, 400), 4), ((301, 400), 5), ((64, 64), 1), ((1, 1), 1)]
)
def test_tolerance_is_rounded_up(size: tuple[int, int], radius: int) -> None:
    assert boundary_tolerance(*size) == radius


def test_empty_masks_and_empty_outlines() -> None:
    nothing, all_of_it = np.zeros((20, 30), dtype=bool), np.ones((20, 30), dtype=bool)
    some = disc(20, 30, 12, 9, 5)
    for first, second, j, f in [
        (nothing, nothing, 1.0, 1.0), (some, nothing, 0.0, 0.0), (nothing, some, 0.0, 0.0),
        (all_of_it, all_of_it, 1.0, 1.0), (all_of_it, nothing, 0.0, 1.0),  # neither has an outline, so these agree
        (some, ~some, 0.0, 1.0),
    ]:  # fmt: skip
        assert (region_similarity(first, second), boundary_f(first, second)) == (j, f)


def test_j_of_shifted_discs_follows_the_closed_form() -> None:
    radius = 60
    for shift in (0, 10, 30, 60, 100, 119, 130):
        half = min(shift / 2 / radius, 1.0)
        lens = 2 * radius**2 * (math.acos(half) - half * math.sqrt(1 - half**2))
        expected = lens / (2 * math.pi * radius**2 - lens)
        first, second = disc(200, 320, 90, 100, radius), disc(200, 320, 90 + shift, 100, radius)
        assert region_similarity(first, second) == pytest.approx(expected, abs=0.004)


def test_f_of_shifted_discs_is_one_up_to_the_tolerance_and_then_drops() -> None:
    radius = boundary_tolerance(300, 400)  # 4
    scores = [boundary_f(disc(300, 400, 150, 150, 60), disc(300, 400, 150 + d, 150, 60)) for d in range(0, 140, 1)]
    assert scores[: radius + 1] == [1.0] * (radius + 1)
    assert all(a > b for a, b in zip(scores[radius : radius + 20], scores[radius + 1 : radius + 21], strict=True))
    assert scores[130] == 0.0
    # outlines of equal circles lie within r of each other where |cos| of the angle is below about r / shift
    assert scores[12] == pytest.approx(1 - 2 / math.pi * math.acos(radius / 12), abs=0.04)


def test_f_of_a_straight_edge_is_all_or_nothing() -> None:
    def left(width: int) -> np.ndarray:
        return np.tile(np.arange(400) < width, (300, 1))

    assert [boundary_f(left(100), left(100 + d)) for d in (0, 3, 4, 5, 9)] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert boundary_f(left(100), left(95)) == 0.0 and boundary_f(left(100), left(96)) == 1.0


def test_symmetric_and_in_range() -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        first, second = blobs(rng, 40, 50), blobs(rng, 40, 50)
        for measure in (region_similarity, boundary_f):
            assert measure(first, second) == pytest.approx(measure(second, first))
            assert 0 <= measure(first, second) <= 1
            assert measure(first, first) == 1.0


def test_sizes_and_types_have_to_agree() -> None:
    small, large = np.zeros((4, 5), dtype=bool), np.zeros((5, 4), dtype=bool)
    for measure in (region_similarity, boundary_f):
        with pytest.raises(ValueError, match=r"predicted \(4, 5\), truth \(5, 4\)"):
            measure(small, large)
        with pytest.raises(ValueError, match="predicted is uint8, truth bool"):
            measure(small.astype(np.uint8), small)
    stack = np.zeros((3, 4, 5), dtype=bool)
    with pytest.raises(ValueError, match=r"predicted \(2, 4, 5\), truth \(3, 4, 5\)"):
        ObjectMasks(1, (0, 1, 2), stack, stack[:2])
    with pytest.raises(ValueError, match=r"object 1: 2 values of frames for masks of shape \(3, 4, 5\)"):
        ObjectMasks(1, (0, 1), stack, stack)
    with pytest.raises(ValueError, match="object 1: 1 values of hard"):
        ObjectMasks(1, (0, 1, 2), stack, stack, {"hard": np.ones(1, dtype=bool)})
    for frames in ((0, 2, 2), (0, 2, 1)):
        with pytest.raises(ValueError, match="object 1: `frames` must be ascending"):
            ObjectMasks(1, frames, stack, stack)


def strips(*widths: int) -> np.ndarray:
    """One frame per width: the left columns of 10, over the whole height of 10 rows."""
    return np.stack([np.tile(np.arange(10) < width, (10, 1)) for width in widths])


def track(object_id: int, truth: Sequence[int], predicted: Sequence[int], step: int = 1) -> ObjectMasks:
    frames, masks = range(0, step * len(truth), step), strips(*truth)
    return ObjectMasks(object_id, frames, masks, strips(*predicted), visibility_flags(masks, frames, within=step))


def test_object_by_hand() -> None:
    # The tolerance is 1 px, so an edge that is 1 off has F = 1 and one that is 2 or more off has F = 0.
    masks = track(4, truth=(4, 4, 4, 4, 0, 4, 4, 4), predicted=(9, 4, 3, 2, 0, 0, 5, 9), step=4)
    scores = evaluate_object(masks, DAVIS_2017)
    assert scores.frames == (4, 8, 12, 16, 20, 24)
    assert scores.j == pytest.approx((1, 3 / 4, 2 / 4, 1, 0, 4 / 5)) and scores.f == (1, 1, 0, 1, 0, 1)
    assert scores.summary() == pytest.approx({"j": 4.05 / 6, "f": 4 / 6, "jf": (4.05 + 4) / 12, "frames": 6})
    assert scores.flags["reappeared"] == (False, False, False, False, True, True)
    assert scores.summary("reappeared") == pytest.approx({"j": 0.4, "f": 0.5, "jf": 0.45, "frames": 2})
    assert scores.summary("absent") == {"j": 1.0, "f": 1.0, "jf": 1.0, "frames": 1.0}
    assert scores.summary("no such flag") == {}
    every = evaluate_object(masks, EVERY)
    assert every.frames == tuple(range(0, 32, 4)) and every.j[0] == pytest.approx(4 / 9)


def test_conventions_differ_where_an_object_leaves_at_once_or_comes_late() -> None:
    gone, late = track(1, (4, 0, 0, 4, 4), (4, 0, 0, 2, 4)), track(2, (0, 0, 4, 4, 4), (0, 0, 4, 2, 4))
    assert evaluate_object(gone, DAVIS_2017).j == (1, 1, 0.5) and evaluate_object(gone, SAV).j == (0.5,)
    # what comes late is right in DAVIS where neither has it: not predicted at all, it fails from its coming on
    assert evaluate_object(late, DAVIS_2017).j == (1, 1, 0.5) and evaluate_object(late, SAV).j == (1, 0.5)
    missed, never = track(3, (0, 0, 4, 4, 4), (0,) * 5), track(4, (0,) * 5, (0, 0, 4, 4, 4))
    assert evaluate_object(missed, DAVIS_2017).j == evaluate_object(missed, DAVIS_2017).f == (1, 0, 0)
    assert evaluate_object(never, DAVIS_2017).j == (1, 0, 0) and evaluate_object(never, SAV).j == ()


def test_recall_and_decay_by_hand() -> None:
    # J is 1, 3/4, 2/4, 1/4, 0, 1, 1, 1 on eight frames; recall counts what is above 0.5. Quarters share their borders:
    # linspace(1, 8, 5) = 1, 2.75, 4.5, 6.25, 8, rounded 1, 3, 4 or 5, 6, 8: frames 1..3 and 6..8.
    scores = evaluate_object(track(1, (4,) * 10, (4, 4, 3, 2, 1, 0, 4, 4, 4, 4)), DAVIS_2017)
    assert scores.j == (1, 0.75, 0.5, 0.25, 0, 1, 1, 1) and scores.f == (1, 1, 0, 0, 0, 1, 1, 1)
    expected = {"j_recall": 5 / 8, "j_decay": 0.75 - 1, "f_recall": 5 / 8, "f_decay": 2 / 3 - 1}
    assert scores.statistics() == pytest.approx(expected)
    one = evaluate_object(track(2, (4, 4, 4), (4, 2, 4)), DAVIS_2017)
    assert one.statistics() == {"j_recall": 0.0, "j_decay": 0.0, "f_recall": 0.0, "f_decay": 0.0}
    assert evaluate_object(track(3, (4, 4), (4, 4)), DAVIS_2017).statistics() == {}
    whole = score_videos(
        {"a": partial(list, [track(1, (4,) * 10, (4,) * 10), track(2, (4, 4, 4), (4, 2, 4))])}, DAVIS_2017
    )
    assert whole.statistics() == {"j_recall": 0.5, "j_decay": 0.0, "f_recall": 0.5, "f_decay": 0.0}
    assert whole.to_dict()["statistics"] == whole.statistics() and score_videos({}, SAV).statistics() == {}


def test_objects_weigh_the_same_and_those_without_frames_nothing() -> None:
    long = track(1, (4,) * 12, (4,) * 12)
    short = track(2, (4, 4, 4), (4, 2, 4))
    never = track(3, (0, 0, 0), (5, 5, 5))
    video = score_video("a", [long, short, never], SAV)
    assert video.summary() == {"j": 0.75, "f": 0.5, "jf": 0.625, "frames": 11.0, "objects": 2.0}
    assert video.to_dict()["not_scored"] == [3]
    assert score_video("a", iter([never, short, long]), SAV).summary() == video.summary()
    assert score_video("a", [], SAV).summary() == score_video("a", [never], SAV).summary() == {}
    with pytest.raises(ValueError, match="a: object id 1 occurs twice"):
        score_video("a", [long, long], SAV)


def three_videos() -> dict[str, LoadObjects]:
    """Loaders made of what any process can import; the second and the last raise."""
    returns = track(1, (4, 4, 0, 4, 4, 4), (4, 4, 0, 0, 4, 4))
    others = [track(1, (5, 5, 5, 5), (5, 4, 5, 5)), track(2, (5,) * 4, (5, 1, 1, 5)), track(3, (2,) * 4, (2,) * 4)]
    return {
        "returns": partial(list, [returns]),
        "missing": partial(open, "no/such/video.mp4"),
        "others": partial(list, others),
        "sizes": partial(ObjectMasks, 1, (0, 1), strips(1, 1), strips(1)),
    }


def test_many_videos_by_hand_and_the_bad_ones_are_reported() -> None:
    done: list[int] = []
    scores = score_videos(three_videos(), SAV, progress=done.append)
    assert done == [1] * 4 and [video.name for video in scores.videos] == ["returns", "others"]
    assert scores.failures == (
        VideoFailure("missing", "FileNotFoundError: [Errno 2] No such file or directory: 'no/such/video.mp4'"),
        VideoFailure(
            "sizes", "ValueError: masks must have the same shape and 3 axes: predicted (1, 10, 10), truth (2, 10, 10)"
        ),
    )
    # over 4 objects, not over 2 videos: returns (1, 1, 0, 1), then (4/5, 1), (1/5, 1/5), (1, 1)
    assert scores.summary() == pytest.approx({
        "j": (0.75 + 0.9 + 0.2 + 1) / 4, "f": (0.75 + 1 + 0 + 1) / 4, "jf": (2.85 + 2.75) / 8,
        "frames": 10, "objects": 4,
    })  # fmt: skip
    assert scores.summary("reappeared") == {"j": 0.5, "f": 0.5, "jf": 0.5, "frames": 2.0, "objects": 1.0}
    written = json.loads(json.dumps(scores.to_dict()))
    assert written["convention"] == "sav" and written["overall"] == scores.summary()
    assert set(written["groups"]) == {"absent", "reappeared"} and len(written["failures"]) == 2
    assert written["videos"][1]["objects"][1]["overall"]["j"] == pytest.approx(0.2)


def test_workers_change_nothing() -> None:
    one, two = (score_videos(three_videos(), DAVIS_2017, workers=workers) for workers in (1, 2))
    assert one == two and one.to_dict() == two.to_dict() and len(one.videos) == len(one.failures) == 2
    with pytest.raises(ValueError, match="at least 1, got 0"):
        score_videos({}, SAV, workers=0)
    empty = score_videos({}, SAV)
    assert empty.summary() == {} and empty.flags == []
