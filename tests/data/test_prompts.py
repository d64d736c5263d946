"""Prompts from masks."""

from __future__ import annotations

import torch

from samdistill.data import box_prompts, pad_masks, point_prompts


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.zeros(2, 12, 16, dtype=torch.bool)
    first[0, 2:9, 3:12] = True
    first[1, 5, 7] = True
    second = torch.zeros(1, 12, 16, dtype=torch.bool)
    return pad_masks([first, second])


def test_slots_are_padded_and_empty_masks_are_not_valid() -> None:
    padded, valid = masks()
    assert padded.shape == (2, 2, 12, 16) and valid.tolist() == [[True, True], [False, False]]
    assert padded[0, 0].sum() == 63 and not padded[1].any()


def test_images_without_objects() -> None:
    padded, valid = pad_masks([torch.zeros(0, 5, 6, dtype=torch.bool)] * 3)
    assert padded.shape == (3, 0, 5, 6) and valid.shape == (3, 0)
    assert box_prompts(padded, valid).boxes.shape == (3, 0, 4)  # type: ignore[union-attr]
    assert point_prompts(padded, valid).points.shape == (3, 0, 1, 2)  # type: ignore[union-attr]


def test_boxes_are_tight_and_points_central() -> None:
    padded, valid = masks()
    boxes, points = box_prompts(padded, valid), point_prompts(padded, valid)
    assert boxes.boxes is not None and points.points is not None and points.labels is not None
    assert boxes.boxes[0].tolist() == [[3, 2, 12, 9], [7, 5, 8, 6]] and boxes.points is None
    # a 9 x 7 rectangle: every pixel of its middle row that is 4 from both ends is equally deep
    x, y = points.points[0, 0, 0].tolist()
    assert y == 5 and 6 <= x <= 8
    assert points.points[0, 1, 0].tolist() == [7, 5]
    assert points.labels.shape == (2, 2, 1) and bool((points.labels == 1).all())
    assert torch.equal(points.valid, valid)
