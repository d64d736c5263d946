"""Prompts for training and scoring the sandbox's detector, drawn from rendered scenes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.ops import box_convert

from samdistill.ops.masks import masks_to_boxes
from samdistill.sandbox.concepts import GENERIC, absent_phrase, phrases_of
from samdistill.sandbox.scenes import Scenes
from samdistill.types import VISUAL, ConceptPrompts

BOX_JITTER = 0.05
POSITIVE, NEGATIVE = 0.57, 0.35
"""Fractions of text prompts that apply and that do not apply. The others are ``GENERIC``."""


@dataclass(frozen=True)
class Questions:
    """Prompts about scenes, and the object slots that each prompt applies to, on the CPU."""

    prompts: ConceptPrompts
    slots: Bool[Tensor, "p k"]


def draw_questions(scenes: Scenes, per_scene: int, rng: np.random.Generator, boxes: bool) -> Questions:
    """Draw ``per_scene`` prompts for each scene: all text, or all exemplar boxes.

    Only annotated objects are targets. The targets of a box are all objects of its object's colour and shape. A scene
    without annotated objects gets a text prompt that does not apply.
    """
    count = len(scenes.images)
    slots = torch.zeros(count * per_scene, scenes.valid.shape[1], dtype=torch.bool)
    exemplars, labels = torch.zeros(len(slots), 1, 4), torch.full((len(slots), 1), -10)
    outlines = (masks_to_boxes(scenes.masks) / scenes.masks.shape[-1]).cpu()
    annotated = [row.nonzero()[:, 0].tolist() for row in scenes.valid.cpu()]
    texts: list[str] = []
    for row in range(len(slots)):
        scene = row // per_scene
        names = {slot: phrases_of(scenes.concepts[scene][slot]) for slot in annotated[scene]}
        draw = rng.random()
        if not names or (not boxes and POSITIVE <= draw < POSITIVE + NEGATIVE):
            texts.append(absent_phrase(list(names.values()), rng))
            continue
        chosen = int(rng.choice(list(names)))
        if boxes:
            exemplars[row, 0], labels[row, 0] = _exemplar(outlines[scene, chosen], rng), 1
            phrase = names[chosen][2]
        else:
            phrase = str(rng.choice(names[chosen])) if draw < POSITIVE else GENERIC
        texts.append(VISUAL if boxes else phrase)
        slots[row, [slot for slot, own in names.items() if phrase == GENERIC or phrase in own]] = True
    image = torch.arange(count).repeat_interleave(per_scene)
    return Questions(ConceptPrompts(tuple(texts), image, exemplars, labels), slots)


def _exemplar(box: Float[Tensor, " 4"], rng: np.random.Generator) -> Float[Tensor, " 4"]:
    """Convert an xyxy box to cxcywh and jitter each edge by a few percent of the side, like a hand-drawn box."""
    # the order of the random numbers is left, right, top, bottom
    noise = rng.normal(0, BOX_JITTER, 4).clip(-2 * BOX_JITTER, 2 * BOX_JITTER)[[0, 2, 1, 3]]
    size = (box[2:] - box[:2]).repeat(2)
    return box_convert(box + torch.from_numpy(noise).float() * size, "xyxy", "cxcywh").clamp(0, 1)
