"""Mask geometry against brute force and torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import masks_to_boxes as torchvision_boxes

from samdistill.ops.masks import centre_points, error_points, mask_iou, masks_to_boxes, random_points, tight_box


def random_masks(count: int = 12, height: int = 14, width: int = 19) -> torch.Tensor:
    coarse = torch.rand(count, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[:, 0] > 0.6


def depth(mask: np.ndarray, x: int, y: int) -> float:
    """Distance from a pixel to the nearest pixel outside, the frame included; by looking at all of them."""
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    return float(np.sqrt(((outside - [y, x]) ** 2).sum(1)).min())


def test_iou_counts_pixels() -> None:
    masks = random_masks()
    first, second = masks[:6], masks[6:]
    for value, a, b in zip(mask_iou(first, second), first.numpy(), second.numpy(), strict=True):
        cells = list(zip(a.flatten(), b.flatten(), strict=True))
        assert value == pytest.approx(sum(x and y for x, y in cells) / sum(x or y for x, y in cells))
    assert mask_iou(first.view(2, 3, 14, 19), second.view(2, 3, 14, 19)).shape == (2, 3)
    empty = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert mask_iou(empty, empty) == 1 and mask_iou(empty, ~empty) == 0


def test_boxes_end_behind_the_last_pixel() -> None:
    masks = random_masks()
    expected = torchvision_boxes(masks) + torch.tensor([0, 0, 1, 1])  # theirs end at the last pixel
    assert torch.equal(masks_to_boxes(masks), expected)
    assert masks_to_boxes(torch.zeros(2, 3, 5, 5, dtype=torch.bool)).tolist() == [[[0.0] * 4] * 3] * 2
    single = torch.zeros(1, 5, 6, dtype=torch.bool)
    single[0, 2, 3] = True
    assert masks_to_boxes(single).tolist() == [[3, 2, 4, 3]]
    for mask, box in zip(masks.numpy(), masks_to_boxes(masks).tolist(), strict=True):
        assert tight_box(mask) == tuple(box)
    assert tight_box(np.zeros((3, 4), bool)) == (0, 0, 0, 0)


def test_centre_points_are_deepest() -> None:
    masks = random_masks()
    for (x, y), mask in zip(centre_points(masks).tolist(), masks.numpy(), strict=True):
        deepest = max(depth(mask, c, r) for r, c in np.argwhere(mask))
        assert mask[y, x] and depth(mask, x, y) == pytest.approx(deepest)
    assert centre_points(torch.ones(1, 5, 9, dtype=torch.bool))[0, 1] == 2  # the frame counts as outside
    assert centre_points(torch.zeros(1, 3, 3, dtype=torch.bool)).tolist() == [[0, 0]]
    assert centre_points(torch.zeros(0, 3, 3, dtype=torch.bool)).shape == (0, 2)


def test_random_points_cover_the_mask_evenly() -> None:
    mask = random_masks(1)[0]
    points, found = random_points(
        mask.expand(4000, -1, -1), torch.rand(4000, generator=torch.Generator().manual_seed(1))
    )
    assert bool(found.all()) and bool(mask[points[:, 1], points[:, 0]].all())
    counts = torch.zeros(mask.shape).index_put_((points[:, 1], points[:, 0]), torch.ones(4000), accumulate=True)[mask]
    expected = 4000 / int(mask.sum())
    assert ((counts - expected) ** 2 / expected).sum() < 1.5 * int(mask.sum())  # chi-squared, about 1 per cell
    nowhere, found = random_points(torch.zeros(1, 3, 3, dtype=torch.bool), torch.tensor([0.7]))
    assert found.tolist() == [False] and nowhere.tolist() == [[0, 0]]


def test_a_draw_takes_the_pixel_of_that_rank_in_reading_order() -> None:
    masks = random_masks(6)
    for mask in masks:
        places = mask.nonzero()
        draws = (torch.arange(len(places)) + 0.5) / len(places)
        points, _ = random_points(mask.expand(len(places), -1, -1), draws)
        assert torch.equal(points.flip(-1), places)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert torch.equal(random_points(masks[:1].expand(2, -1, -1), ends)[0].flip(-1), masks[0].nonzero()[[0, -1]])


def test_corrective_clicks() -> None:
    target = torch.zeros(3, 12, 12, dtype=torch.bool)
    target[:, 2:9, 2:9] = True
    predicted = target.clone()
    predicted[0, 2:9, 4:9] = False  # misses more than it spills
    predicted[0, 10, 2:9] = True
    predicted[1, 2:9, 9:12] = True  # spills over
    points, labels = error_points(predicted, target)
    assert labels.tolist() == [1, 0, 1]
    assert points[:, 0].tolist() == [6, 10, 5] and points[2, 1] == 5
    assert 4 <= points[0, 1] <= 6 and 3 <= points[1, 1] <= 7  # rows equally deep in the missed and the spilled part


def test_random_corrective_clicks_fall_anywhere_in_the_larger_error() -> None:
    target = torch.zeros(5, 9, 9, dtype=torch.bool)
    target[:4, 2:7, 2:7] = True
    predicted = target.clone()
    predicted[0, 2:4] = False  # misses 10, spills 9
    predicted[0, 8] = True
    predicted[1, 2, 2:6] = False  # misses 4, spills 9
    predicted[1, 0] = True
    predicted[2] = True  # spills over all of the rest
    clicks: list[set[tuple[int, int]]] = [set() for _ in target]
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        points, labels = error_points(predicted, target, torch.rand(5, generator=generator))
        assert labels.tolist() == [1, 0, 0, 1, 1] and points.dtype == labels.dtype == torch.int64
        for seen, (x, y) in zip(clicks, points.tolist(), strict=True):
            seen.add((x, y))
    regions = [target[0] & ~predicted[0], predicted[1] & ~target[1], ~target[2], target[3]]
    assert [{(x, y) for y, x in region.nonzero().tolist()} for region in regions] == clicks[:4]
    assert clicks[4] == {(0, 0)}  # nothing there and nothing found
    draws = torch.rand(5, generator=generator)
    whole = error_points(predicted, target, draws)[0]
    parts = [error_points(predicted[part], target[part], draws[part])[0] for part in (slice(0, 2), slice(2, 5))]
    assert torch.equal(whole, torch.cat(parts)), "a click depends on its own object alone"
    assert error_points(predicted[:0], target[:0], draws[:0])[0].shape == (0, 2)
