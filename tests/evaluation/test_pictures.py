"""Overlays, pixel by pixel."""

from __future__ import annotations

import numpy as np
import torch

from samdistill.evaluation.pictures import picture
from samdistill.inference.drawing import COLOURS, overlay
from samdistill.inference.prompting import Targets


def test_overlay_tints_inside_and_only_inside():
    image = np.full((40, 60, 3), 100, np.uint8)
    mask = torch.zeros(1, 40, 60, dtype=torch.bool)
    mask[0, 10:30, 10:40] = True
    drawn = overlay(image, mask)
    assert (drawn[:10] == 85).all() and (drawn[:, 40:] == 85).all()  # dimmed alike, no colour
    expected = 0.45 * 85 + 0.55 * np.array(COLOURS[0])
    assert np.abs(drawn[20, 25] - expected).max() <= 1
    assert np.abs(drawn[10, 20].astype(int) - drawn[20, 25].astype(int)).max() > 20  # outlined
    assert image[20, 25].tolist() == [100, 100, 100]  # the original is untouched


def test_a_large_mask_hides_no_small_one():
    large, small = torch.ones(50, 50, dtype=torch.bool), torch.zeros(50, 50, dtype=torch.bool)
    small[20:32, 20:32] = True
    image = np.zeros((50, 50, 3), np.uint8)
    for order in ([large, small], [small, large]):
        colour = np.array(COLOURS[1 if order[1] is small else 0])
        drawn = overlay(image, torch.stack(order)).astype(float)
        assert np.abs(drawn[26, 26] - colour).max() < np.abs(drawn[26, 26] - drawn[5, 5]).max()


def test_padding_is_cut_off_and_prompts_are_drawn_in_place():
    masks = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    masks[0, 0, 8:24, 16:32] = True
    targets = Targets.of(masks, torch.ones(1, 1, dtype=torch.bool))
    canvas = torch.zeros(3, 64, 64, dtype=torch.uint8)
    shown = picture("key", canvas, (32, 64), "box", targets, {"student": masks}, None)
    assert {p.image.shape for p in shown.panels} == {(192, 384, 3)}  # six times the unpadded 32 x 64
    rows, columns = np.nonzero(shown.panels[0].image.any(-1))
    assert abs(rows.min() - 48) <= 2 and abs(rows.max() - 144) <= 2
    assert abs(columns.min() - 96) <= 2 and abs(columns.max() - 192) <= 2
    assert shown.panels[2].iou == 1.0 and shown.against == "ground truth"
    clicked = picture("key", canvas, (32, 64), "point", targets, {"student": masks}, "student")
    rows, columns = np.nonzero(clicked.panels[0].image.any(-1))
    assert 48 < rows.mean() < 144 and 96 < columns.mean() < 192 and len(rows) < 400
    assert [p.title for p in clicked.panels] == ["image", "student"]
