"""The sandbox's concept detector: how large it is, and how it starts."""

from __future__ import annotations

import pytest
import torch

from detector_model import QUERIES, build_detector_teacher
from samdistill.checkpoints.promptable import load_promptable


@pytest.fixture(scope="module")
def fresh():
    return build_detector_teacher(0).eval()


def test_its_size_is_as_documented(fresh) -> None:
    assert abs(sum(p.numel() for p in fresh.parameters()) - 5.2e6) < 0.1e6


def test_its_trunk_is_the_trackers(fresh) -> None:
    ours, theirs = (model.vision_encoder.backbone.state_dict() for model in (fresh, load_promptable("sandbox")))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_seed_decides_the_weights(fresh) -> None:
    same, other = build_detector_teacher(0).state_dict(), build_detector_teacher(1).state_dict()
    state = fresh.state_dict()
    assert all(torch.equal(same[name], state[name]) for name in state)
    assert any(not torch.equal(other[name], state[name]) for name in state)


def test_queries_start_on_a_grid_each_with_its_neighbourhood(fresh) -> None:
    boxes = fresh.detr_decoder.reference_points.weight.sigmoid()
    expected = [[0.1 + 0.2 * x, 0.1 + 0.2 * y, 1 / 3, 1 / 3] for y in range(5) for x in range(5)]
    torch.testing.assert_close(boxes, torch.tensor(expected))
    with torch.no_grad():
        tokens = {"input_ids": torch.tensor([[2, 4, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
        found = fresh(pixel_values=torch.zeros(1, 3, 126, 126), **tokens)
    assert found.pred_boxes.shape == (1, QUERIES, 4)  # no layer moves them before it is trained
    torch.testing.assert_close((found.pred_boxes[0, :, :2] + found.pred_boxes[0, :, 2:]) / 2, boxes[:, :2])
    assert found.presence_logits.item() == 0


@torch.no_grad()
def test_a_query_attends_inside_its_box_and_less_the_farther_away(fresh) -> None:
    box, grid = torch.tensor([[[0.5, 0.5, 1 / 3, 1 / 3]]]), 9
    bias = fresh.detr_decoder._get_rpb_matrix(box, (torch.tensor(grid), torch.tensor(grid)))[0, :, 0]
    at = torch.arange(grid) / grid  # as the decoder places its cells
    inside = (at >= 1 / 3 - 1e-6) & (at <= 2 / 3 + 1e-6)
    within = (inside[:, None] & inside[None]).flatten()
    assert bias.shape == (4, grid * grid) and within.sum() == 16
    averages = torch.stack([bias[:, within].mean(1), bias[:, ~within].mean(1)], 1)
    assert bool((averages[:, 0] > averages[:, 1] + 0.3).all())
    strong = bias[:2].view(2, grid, grid)  # the heads that are held to their box
    assert bool((strong.flatten(1)[:, within].amin(1) > strong.flatten(1)[:, ~within].amax(1)).all())
    row = strong[:, 4]
    assert bool((row[:, 5] > row[:, 7]).all()) and bool((row[:, 7] > row[:, 8]).all())
    assert bool((row[:, 4] > row[:, 1]).all()) and bool((row[:, 1] > row[:, 0]).all())
