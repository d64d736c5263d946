"""The protocol, against hand-built masks and a stand-in decoder whose answers are known."""

from __future__ import annotations

import pytest
import torch

from samdistill.inference import prompting
from samdistill.inference.prompting import PROMPTS, Targets, prompted_masks, prompts_at_once, refined_prompts
from samdistill.ops.masks import mask_iou
from samdistill.ops.promptable import Embeddings, MaskPrediction, embed
from samdistill.sandbox.scenes import render_scenes
from samdistill.types import ImageBatch, Prompts
from tracker_model import build_teacher

NOTHING = Embeddings((torch.zeros(1, 1, 1, 1),), torch.zeros(1, 1, 1, 1))


def rectangle(top: int, bottom: int, left: int, right: int, size: int = 32) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.fixture
def asked(monkeypatch) -> list[Prompts]:
    """Every prompt the decoder gets; it answers with the left half of the canvas, then with all of it."""
    seen: list[Prompts] = []

    def answer(model, embeddings, prompts: Prompts) -> MaskPrediction:
        seen.append(prompts)
        logits = torch.full((*prompts.valid.shape, 1, 32, 32), -4.0)
        logits[..., : 16 if prompts.masks is None else 32] = 4.0
        return MaskPrediction(logits, torch.ones(*prompts.valid.shape, 1), NOTHING.trunk, NOTHING.trunk)

    monkeypatch.setattr(prompting, "predict", answer)
    return seen


def test_box_and_point_are_those_of_the_mask(asked):
    targets = Targets.of(rectangle(3, 8, 10, 21)[None, None], torch.ones(1, 1, dtype=torch.bool))
    prompted_masks(None, NOTHING, targets, ("box", "point"))
    assert asked[0].boxes.tolist() == [[[10.0, 3.0, 21.0, 8.0]]]
    (x, y), label = asked[1].points[0, 0, 0].tolist(), asked[1].labels[0, 0, 0].item()
    assert label == 1 and y == 5 and 12 <= x <= 18  # the middle row is deepest; ties along it


@pytest.mark.parametrize(
    ("target", "click", "label"),
    [
        (rectangle(0, 32, 0, 32), lambda x, y: x >= 16, 1),  # the right half is missed
        (rectangle(12, 20, 0, 8), lambda x, y: x >= 8 or not 12 <= y < 20, 0),  # most of the left half is spilled
    ],
)
def test_refine_clicks_into_the_models_own_error_and_hands_back_its_logits(asked, target, click, label):
    targets = Targets.of(target[None, None], torch.ones(1, 1, dtype=torch.bool))
    found = prompted_masks(None, NOTHING, targets, PROMPTS)
    refined = asked[-1]
    assert len(asked) == 3 and refined.points.shape == (1, 1, 2, 2)
    assert torch.equal(refined.points[:, :, :1], asked[1].points)
    assert refined.labels[0, 0].tolist() == [1, label]
    assert click(*refined.points[0, 0, 1].tolist())
    assert (refined.masks[..., :16] > 0).all() and (refined.masks[..., 16:] < 0).all()
    assert found["point"].sum() == 16 * 32 and found["refine"].sum() == 32 * 32


def test_a_second_correction_keeps_the_first_and_follows_the_last_answer(asked):
    targets = Targets.of(rectangle(12, 20, 0, 8)[None, None], torch.ones(1, 1, dtype=torch.bool))
    found = prompted_masks(None, NOTHING, targets, ("refine2", "point"))
    assert list(found) == ["refine2", "point"] and len(asked) == 3
    assert torch.equal(asked[2].points[:, :, :2], asked[1].points) and asked[2].labels[0, 0].tolist() == [1, 0, 0]
    x, _y = asked[2].points[0, 0, 2].tolist()
    assert x >= 16 and (asked[2].masks > 0).all()  # the second answer, all of the canvas, errs deepest on the right
    assert found["point"].sum() == 16 * 32 and found["refine2"].sum() == 32 * 32


def test_what_is_painted_on_padding_does_not_count_and_is_not_clicked_on(asked):
    inside = rectangle(0, 10, 0, 32)[None]
    targets = Targets.of(rectangle(0, 10, 0, 16)[None, None], torch.ones(1, 1, dtype=torch.bool), inside)
    found = prompted_masks(None, NOTHING, targets, ("point", "refine"))
    assert torch.equal(found["point"], targets.masks)  # the left half, cut at row 10: a perfect answer
    assert asked[-1].labels[0, 0].tolist() == [1, 1] and asked[-1].points[0, 0, 1, 1] < 10


def test_only_what_is_wanted_is_asked(asked):
    targets = Targets.of(rectangle(3, 8, 10, 21)[None, None], torch.ones(1, 1, dtype=torch.bool))
    assert list(prompted_masks(None, NOTHING, targets, ("box",))) == ["box"] and len(asked) == 1
    assert list(prompted_masks(None, NOTHING, targets, ("refine",))) == ["refine"] and len(asked) == 3


def test_a_correction_needs_a_click_before_it():
    valid = torch.ones(1, 1, dtype=torch.bool)
    mask = rectangle(1, 2, 1, 2)[None, None]
    with pytest.raises(ValueError, match="follows a point"):
        refined_prompts(Prompts(valid, boxes=torch.zeros(1, 1, 4)), torch.zeros(1, 1, 32, 32), mask, mask)


def test_padding_slots_and_batching_change_no_score():
    model, scenes = build_teacher(3).eval(), render_scenes(range(3), 126, seed=7)
    with torch.no_grad():
        embeddings = embed(model, ImageBatch.full(scenes.images))
    together = Targets.of(scenes.masks, scenes.valid)
    batch = prompted_masks(model, embeddings, together)
    counts = scenes.valid.sum(1).tolist()
    assert len(set(counts)) > 1, "the scenes have to differ in their number of objects"
    for index, count in enumerate(counts):
        alone = together.one_image(index, 99)
        assert alone.masks.shape[:2] == (1, count)
        for kind, masks in prompted_masks(model, embeddings.one_image(index), alone).items():
            expected = mask_iou(batch[kind][index], scenes.masks[index])[scenes.valid[index]]
            torch.testing.assert_close(mask_iou(masks, alone.masks)[0], expected, atol=2e-3, rtol=0)


def test_parts_of_the_objects_are_the_whole():
    masks = torch.stack([rectangle(i, i + 4, 2, 9) for i in range(5)])[None].repeat(2, 1, 1, 1)
    targets = Targets.of(masks, torch.tensor([[True] * 5, [True, False, True, False, False]]))
    parts = [targets.part(start, start + 2) for start in range(0, len(targets), 2)]
    assert [len(part) for part in parts] == [2, 2, 1]
    for name in ("box", "point"):
        whole = getattr(targets, name)
        for f in ("valid", "boxes", "points", "labels"):
            pieces = [getattr(getattr(part, name), f) for part in parts]
            assert all(p is None for p in pieces) if getattr(whole, f) is None else torch.equal(
                torch.cat(pieces, 1), getattr(whole, f)
            )  # fmt: skip


def test_full_size_canvases_are_asked_a_few_at_a_time():
    assert 1 <= prompts_at_once(4, (1008, 1008)) <= 8
    assert prompts_at_once(64, (4032, 4032)) == 1
    assert prompts_at_once(8, (126, 126)) > 64
