"""Overlaps and boxes of instances, by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from samdistill.ops.sights import Sight, apart, overlap, to_drop


def test_overlap_is_the_iou_of_the_whole_masks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        masks = []
        for _ in range(2):
            mask, (top, left) = np.zeros((12, 15), bool), rng.integers(0, 8, 2)
            mask[top : top + 5, left : left + 6] = rng.random((5, 6))[: 12 - top, : 15 - left] > 0.4
            masks.append(mask)
        first, second = (Sight.of(1.0, mask) for mask in masks)
        assert first is not None and second is not None
        assert overlap(first, second) == pytest.approx((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())
    assert Sight.of(1.0, np.zeros((3, 3), bool)) is None
    assert apart(Sight.filled((0, 0, 2, 2), (9, 9)), Sight.filled((3, 4, 5, 6), (9, 9))) == 5  # type: ignore[arg-type]
    filled = Sight.filled((0.5, 1, 2.1, 3), (9, 9))
    assert filled.box == (0, 1, 3, 3) and filled.area == filled.mask.sum() == 6


def test_the_frame_that_shows_an_object_last_stays() -> None:
    assert to_drop([{1}, {1}, set()], 2) == 0
    assert to_drop([{1}, set(), {2}], 2) == 1
    assert to_drop([{1}, {2}, {3}], 2) == 0  # too many frames are the last to show one
