"""Questions about rendered scenes: what answers them agrees with the scenes' own names."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from detector_questions import NEGATIVE, POSITIVE, draw_questions
from samdistill.ops.masks import masks_to_boxes
from samdistill.sandbox.concepts import GENERIC, PHRASES
from samdistill.sandbox.scenes import Scenes, render_scenes
from samdistill.types import VISUAL
from tracker_model import IMAGE_SIZE, TRAIN_SEED


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return render_scenes(range(40), IMAGE_SIZE, TRAIN_SEED)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_words_are_answered_by_the_annotated_objects_of_that_name(scenes: Scenes) -> None:
    found = draw_questions(scenes, 10, rng(), boxes=False)
    assert found.prompts.image.tolist() == [i // 10 for i in range(400)] and len(found.prompts.texts) == 400
    assert bool((found.prompts.labels == -10).all())
    for text, image, slots in zip(found.prompts.texts, found.prompts.image.tolist(), found.slots, strict=True):
        for slot in range(slots.shape[0]):
            shape, colour = scenes.concepts[image][slot][:2]
            named = text == GENERIC or set(text.split()) <= {shape, colour}
            assert bool(slots[slot]) == (named and bool(scenes.valid[image, slot])), (text, shape, colour)


def test_shares_of_the_kinds_of_questions(scenes: Scenes) -> None:
    found = draw_questions(scenes, 30, rng(), boxes=False)
    generic = np.mean([text == GENERIC for text in found.prompts.texts])
    absent = 1 - found.slots.any(1).float().mean().item()
    assert absent == pytest.approx(NEGATIVE, abs=0.05) and generic == pytest.approx(1 - POSITIVE - NEGATIVE, abs=0.03)
    assert set(found.prompts.texts) <= {*PHRASES, GENERIC}


def test_a_box_lies_on_an_object_and_asks_for_all_of_its_colour_and_shape(scenes: Scenes) -> None:
    found = draw_questions(scenes, 4, rng(), boxes=True)
    assert set(found.prompts.texts) == {VISUAL} and bool((found.prompts.labels == 1).all())
    outlines = masks_to_boxes(scenes.masks) / IMAGE_SIZE
    for row, image in enumerate(found.prompts.image.tolist()):
        x, y, width, height = found.prompts.boxes[row, 0].tolist()
        drawn = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
        wanted = found.slots[row].nonzero()[:, 0]
        tight = outlines[image, wanted]
        side = (tight[:, 2:] - tight[:, :2]).repeat(1, 2)
        off = ((drawn - tight).abs() / side).amax(1)
        assert off.min() < 0.2  # 10 % on either side of an edge, and what is cut at the border
        assert len({scenes.concepts[image][slot][3] for slot in wanted.tolist()}) == 1
        same = [names[3] == scenes.concepts[image][wanted[0]][3] for names in scenes.concepts[image]]
        assert found.slots[row].tolist() == (torch.tensor(same) & scenes.valid[image]).tolist()


def test_of_a_scene_without_annotated_objects_something_absent_is_asked(scenes: Scenes) -> None:
    empty = dataclasses.replace(scenes, valid=torch.zeros_like(scenes.valid))
    for boxes in (False, True):
        found = draw_questions(empty, 2, rng(), boxes)
        assert not found.slots.any() and bool((found.prompts.labels == -10).all())
        assert set(found.prompts.texts) <= set(PHRASES)


def test_the_generator_decides_the_questions(scenes: Scenes) -> None:
    first, same, other = (draw_questions(scenes, 3, rng(seed), False).prompts.texts for seed in (1, 1, 2))
    assert first == same != other
