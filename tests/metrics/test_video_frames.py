"""Which frames of an object count, and which carry a flag."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from samdistill.metrics.video_frames import (
    DAVIS_2017,
    OCCLUDED_BELOW,
    SAV,
    VideoConvention,
    absent,
    first_frame_objects,
    occluded,
    reappeared,
    visibility_flags,
)

REAL = Path(__file__).parents[3] / "shared" / "data" / "sav"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real SA-V sample at {REAL}")
EVERY = VideoConvention("every", skip_first=False, skip_last=False, from_first_frame=False)


def row(text: str) -> np.ndarray:
    """One frame per letter: x where something is, . where nothing is."""
    return np.array([letter == "x" for letter in text], dtype=bool)


@pytest.mark.parametrize(
    ("convention", "visible", "predicted", "counted"),
    [
        (DAVIS_2017, "xxxxx", "xxxxx", [1, 2, 3]),
        (DAVIS_2017, "x....", ".....", [1, 2, 3]),  # gone, and rightly not predicted: right on three frames
        (DAVIS_2017, ".xxxx", "xxxxx", [1, 2, 3]),  # comes late: which objects count is first_frame_objects' say
        (DAVIS_2017, ".....", ".....", [1, 2, 3]),  # does not exist
        (DAVIS_2017, "xx", "xx", []),
        (SAV, "xxxxx", "xxxxx", [1, 2, 3]),
        (SAV, "xxxxx", ".....", [1, 2, 3]),
        (SAV, "x..xxx", "x..xxx", [3, 4]),  # gone at once: nothing starts before it is back
        (SAV, "x..xxx", "x.xxxx", [2, 3, 4]),  # but a false alarm before does count
        (SAV, "x.xx.x", "x.xx.x", [2, 3, 4]),  # empty on both sides after the start counts
        (SAV, "...xxx", "...xxx", [3, 4]),  # comes later: the first file was an empty one
        (SAV, "x....", "xx...", []),  # visible on none of the frames left
        (SAV, "x...x", "x...x", []),
        (SAV, "xx", "xx", []),
        (EVERY, "xx", "xx", [0, 1]),
        (EVERY, ".x.", "...", [1, 2]),
        (EVERY, "", "", []),
        (DAVIS_2017, "", "", []),
    ],
)
def test_counted_frames_by_hand(convention: VideoConvention, visible: str, predicted: str, counted: list[int]) -> None:
    assert convention.counted(row(visible), row(predicted)).tolist() == counted


@pytest.mark.parametrize(
    ("seen", "counted"),
    [
        ([1, 2], [1, 2]),
        ([3], [1, 2, 3]),  # 1 and 2 come late or do not exist
        ([4, 2], [1, 2, 3, 4]),
        ([], []),
        ([255], [255]),  # a binary mask, where the source takes it for an object
        ([2, 255], [1, 2, 255]),
        ([0, 2], [0, 1, 2]),  # SA-V numbers from 0
    ],
)
def test_davis_counts_the_ids_up_to_the_greatest_of_the_first_frame(seen: list[int], counted: list[int]) -> None:
    assert first_frame_objects(seen) == counted


@pytest.mark.parametrize(("frames", "inner"), [(0, 0), (1, 0), (2, 0), (3, 1), (9, 7)])
def test_the_first_and_the_last_frame_do_not_count(frames: int, inner: int) -> None:
    for convention in (DAVIS_2017, SAV):
        assert list(range(frames))[convention.inner(frames)] == list(range(1, 1 + inner))
    assert list(range(frames))[EVERY.inner(frames)] == list(range(frames))


def test_sav_equals_the_evaluator_read_frame_by_frame() -> None:
    """The evaluator's way: ids join a set as they show, and each frame adds one value per id in the set."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        visible, predicted = rng.random((2, rng.integers(0, 9))) < rng.random((2, 1))
        seen = shown = False
        counted = []
        for index in list(range(len(visible)))[1:-1]:
            seen, shown = seen or visible[index] or predicted[index], shown or visible[index]
            counted += [index] * bool(seen)
        assert SAV.counted(visible, predicted).tolist() == (counted if shown else [])


@pytest.mark.parametrize(
    ("within", "flagged"),
    [(0, "......x...x."), (4, "......xx..xx"), (7, "......xx..xx"), (8, "......xxx.xx"), (400, "......xxx.xx")],
)
def test_reappeared_by_hand(within: int, flagged: str) -> None:
    visible = row("..xx..xxx.xx")  # comes at 2, returns at 6 and at 10; annotated every 4th frame
    frames = range(0, 48, 4)
    assert reappeared(visible, frames, within).tolist() == row(flagged).tolist()
    assert absent(visible).tolist() == row("....xx...x..").tolist()


def test_reappeared_counts_video_frames_not_annotations() -> None:
    visible = row("x.xxx")
    assert reappeared(visible, [0, 1, 2, 3, 4], 2).tolist() == row("..xxx").tolist()
    assert reappeared(visible, [0, 4, 8, 12, 16], 2).tolist() == row("..x..").tolist()
    assert reappeared(visible, [0, 4, 8, 9, 30], 2).tolist() == row("..xx.").tolist()


@pytest.mark.parametrize("visible", ["xxxx", "....", "..xx", "xx..", "x", ".", ""])
def test_what_never_returns_never_reappears(visible: str) -> None:
    assert not reappeared(row(visible), range(len(visible)), 99).any()


def test_reappeared_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        visible = rng.random(12) < 0.6
        frames = np.cumsum(rng.integers(1, 5, 12))
        within = int(rng.integers(0, 9))
        for index in range(12):
            back = any(
                visible[start : index + 1].all() and not visible[start - 1] and visible[: start - 1].any()
                and frames[index] - frames[start] <= within
                for start in range(1, index + 1)
            )  # fmt: skip
            assert reappeared(visible, frames, within)[index] == back


def test_occluded_needs_to_be_visible_and_partly_hidden() -> None:
    share = np.array([1.0, OCCLUDED_BELOW, 0.74, 0.0, np.nan, 0.2])
    assert occluded(row("xxx..x"), share).tolist() == row("..x..x").tolist()
    assert occluded(row("xxx..x"), share, below=0.5).tolist() == row(".....x").tolist()
    for bad in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"0\.\.1"):
            occluded(row("x"), np.array([bad]))


def test_flags_follow_from_masks() -> None:
    truth = np.zeros((5, 3, 4), dtype=bool)
    truth[[0, 2, 3, 4], 1, 1] = True
    flags = visibility_flags(truth, range(5), within=1)
    assert {name: values.tolist() for name, values in flags.items()} == {
        "absent": row(".x...").tolist(), "reappeared": row("..xx.").tolist()
    }  # fmt: skip
    shared = visibility_flags(truth, range(5), within=1, visible_share=np.array([1, 0, 0.5, 0.9, 0.1]))
    assert shared["occluded"].tolist() == row("..x.x").tolist() and set(shared) == {*flags, "occluded"}


def test_lengths_have_to_agree() -> None:
    with pytest.raises(ValueError, match=r"\(2,\).*frames \(3,\)"):
        reappeared(row("xx"), [0, 1, 2], 1)
    with pytest.raises(ValueError, match=r"\(2,\).*visible_share \(3,\)"):
        occluded(row("xx"), np.ones(3))


@needs_real
@pytest.mark.parametrize("name", ["sav_000001_manual", "sav_000001_auto", "sav_900010_manual"])
def test_real_annotations(name: str) -> None:
    """The file counts the changes of visibility after the first appearance, and gives its frame, for itself."""
    annotation: dict[str, Any] = json.loads((REAL / f"{name}.json").read_text())
    frames = range(0, 4 * len(annotation["masklet"]), 4)
    for index in range(int(annotation["masklet_num"])):
        visible = np.array([coco_mask.area(objects[index]) > 0 for objects in annotation["masklet"]])
        first = int(np.argmax(visible))
        changes = int(np.count_nonzero(visible[first:-1] != visible[first + 1 :]))
        assert changes == annotation["masklet_visibility_changes"][index]
        assert np.count_nonzero(reappeared(visible, frames, 0)) == changes // 2
        assert first == annotation["masklet_first_appeared_frame"][index]  # counted in annotations, not in video frames
        counted = SAV.counted(visible, visible)
        assert counted[0] == max(1, first) and counted[-1] == len(visible) - 2
        assert len(DAVIS_2017.counted(visible, visible)) == len(visible) - 2
