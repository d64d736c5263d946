"""Masks on their way to the processes that score them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from samdistill.metrics.video_files import MaskFile, load_objects
from samdistill.metrics.video_frames import visibility_flags


def some(seed: int, frames: int, size: tuple[int, int]) -> np.ndarray:
    masks = np.random.default_rng(seed).random((frames, *size)) < 0.3
    masks[1:2] = False
    return masks


@pytest.mark.parametrize("size", [(5, 7), (8, 16), (1, 3)])
def test_what_is_loaded_is_what_was_added(size: tuple[int, int], tmp_path: Path) -> None:
    truth, one, two = (some(seed, 4, size) for seed in range(3))
    file = MaskFile(size, [7, 0, 9], ["a", "b"], within=4)
    for row in range(4):
        file.add(0, 4 * row, truth[row], {"a": one[row], "b": two[row]}, visible_share=0.25 * row)
        if row > 1:
            file.add(1, 4 * row, one[row], {"a": truth[row], "b": one[row]})
    file.save(tmp_path / "x.npz")
    for name, predicted in (("a", one), ("b", two)):
        first, second, third = load_objects(tmp_path / "x.npz", name)
        assert [o.object_id for o in (first, second, third)] == [7, 0, 9]
        assert list(first.frames) == [0, 4, 8, 12] and np.array_equal(first.truth, truth)
        assert np.array_equal(first.predicted, predicted) and first.predicted.dtype == np.bool_
        assert list(second.frames) == [8, 12] and np.array_equal(second.truth, one[2:])
        assert np.array_equal(second.predicted, (truth if name == "a" else one)[2:])
        assert third.truth.shape == third.predicted.shape == (0, *size)
        wanted = visibility_flags(truth, [0, 4, 8, 12], 4, np.arange(4) * 0.25)
        assert (
            set(first.flags) == set(wanted) == {"absent", "reappeared", "occluded"} and "occluded" not in second.flags
        )
        assert all(np.array_equal(first.flags[flag], values) for flag, values in wanted.items())


def test_a_file_is_small(tmp_path: Path) -> None:
    mask = np.zeros((480, 854), bool)
    mask[100:300, 200:500] = True
    file = MaskFile(mask.shape, [1], ["a"], within=0)
    for frame in range(20):
        file.add(0, frame, mask, {"a": mask})
    file.save(tmp_path / "x.npz")
    assert (tmp_path / "x.npz").stat().st_size < mask.size / 20  # 40 masks of a byte a pixel


def test_whoever_scores_needs_no_torch() -> None:
    code = "import sys, samdistill.metrics.video_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
