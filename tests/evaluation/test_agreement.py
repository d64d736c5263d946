"""Pseudo-objects: where the grid clicks, what is kept of the answers, and what is thrown away."""

from __future__ import annotations

import pytest
import torch

from samdistill.evaluation import agreement
from samdistill.evaluation.agreement import PseudoObjects, grid_points, suppress
from samdistill.ops.promptable import Embeddings, MaskPrediction
from samdistill.types import ImageBatch

SIZE, LOW = 64, 32
NOTHING = torch.zeros(0)  # what nobody looks at here


def square(x: float, y: float, half: int) -> torch.Tensor:
    """A square around a canvas point, on the low-resolution grid."""
    mask = torch.zeros(LOW, LOW, dtype=torch.bool)
    row, column = int(y / 2), int(x / 2)
    mask[max(row - half, 0) : row + half, max(column - half, 0) : column + half] = True
    return mask


@pytest.fixture
def clicks(monkeypatch) -> list[tuple[float, float]]:
    """The teacher answers each click with a 6 x 6 square around it, surer to the right; far left, with everything."""
    seen: list[tuple[float, float]] = []

    def answer(model, embeddings, prompts) -> MaskPrediction:
        masks, scores = [], []
        for x, y in prompts.points[:, :, 0].flatten(0, 1).tolist():
            seen.append((x, y))
            masks.append(torch.ones(LOW, LOW, dtype=torch.bool) if x < 8 else square(x, y, 3))
            scores.append(1.0 if x < 8 else x / 100)
        shape = prompts.valid.shape
        logits = torch.where(torch.stack(masks), 5.0, -5.0).view(*shape, 1, LOW, LOW)
        return MaskPrediction(logits, torch.tensor(scores).view(*shape, 1), NOTHING, NOTHING)

    monkeypatch.setattr(agreement, "predict", answer)
    return seen


def find(rule: PseudoObjects, sizes=((SIZE, SIZE),)) -> list[torch.Tensor]:
    count = len(sizes)
    size = torch.tensor(sizes)
    images = torch.zeros(count, 3, SIZE, SIZE, dtype=torch.uint8)
    batch = ImageBatch(images, size, size, tuple(map(str, range(count))), torch.zeros(count, dtype=torch.int64))
    return rule.find(None, Embeddings((), torch.zeros(count, 1, 1, 1)), batch)


def test_grid_covers_the_image_and_not_its_padding():
    points = grid_points(torch.tensor([[64, 64], [64, 32]]), 4)
    assert points[0, 0].tolist() == [8.0, 8.0] and points[0, -1].tolist() == [56.0, 56.0]
    assert points[1].amax(0).tolist() == [28.0, 56.0]  # x, y


def test_suppress_keeps_the_best_of_overlapping_masks():
    masks = torch.stack([square(20, 20, 4), square(20, 22, 4), square(50, 50, 4), square(20, 20, 4)])
    assert suppress(masks, 0.5).tolist() == [0, 2]
    assert suppress(masks, 0.9).tolist() == [0, 1, 2]  # 7/9 overlap passes, the copy does not
    assert suppress(masks[:0], 0.5).tolist() == []


def test_keeps_the_surest_half_of_the_sane_masks_in_order(clicks):
    (found,) = find(PseudoObjects(grid=8, limit=64))
    assert len(clicks) == 64 and min(x for x, _ in clicks) == 4
    # the first column answers with the whole image: too large although surest. Of the other seven, the median is
    # x = 36 (five columns up to there and beyond): columns 36, 44, 52, 60 stay.
    assert len(found) == 4 * 8
    centres = [(mask.nonzero().float().mean(0)[1]).item() for mask in found]
    assert min(centres) > 32 and sorted(centres, reverse=True)[0] == pytest.approx(centres[0], abs=2)
    assert find(PseudoObjects(grid=8, limit=5))[0].shape == (5, SIZE, SIZE)


def test_size_limits_are_shares_of_the_image(clicks):
    assert find(PseudoObjects(grid=2, max_area=0.02))[0].shape[0] == 0  # a square of 36 of 1024 is 3.5 %
    assert find(PseudoObjects(grid=2, min_area=0.05))[0].shape[0] == 0
    # half the image is padding: the same squares cover twice the share
    assert find(PseudoObjects(grid=2, max_area=0.05), ((SIZE, SIZE),))[0].shape[0] > 0
    assert find(PseudoObjects(grid=2, max_area=0.05), ((SIZE, SIZE // 2),))[0].shape[0] == 0


def test_masks_end_where_the_image_ends(clicks):
    full, narrow = find(PseudoObjects(grid=4), ((SIZE, SIZE), (SIZE, 40)))
    assert full.any(0)[:, 40:].any() and narrow.any() and not narrow[:, :, 40:].any()
