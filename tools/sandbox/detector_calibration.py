"""Calibration of a detector's scores: one factor for its query logits and one for its presence logits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import Sam3Model

from detector_answers import ask_scenes
from detector_objective import assign
from detector_questions import draw_questions
from samdistill.ops.masks import masks_to_boxes
from samdistill.sandbox.scenes import render_scenes
from tracker_model import IMAGE_SIZE, TRAIN_SEED

SCENES, PER_SCENE, AT_ONCE = 192, 6, 32
FIRST_SCENE = 20_000_000
"""Number of the first scene used for calibration. These scenes of the training world are not used in training, and the
held-out world is used for evaluation only."""


class Factors(NamedTuple):
    """Factors of the logits (inverse temperatures)."""

    query: float
    presence: float


@torch.no_grad()
def calibrate(model: Sam3Model, scenes: int = SCENES) -> Factors:
    """Scale query and presence logits in place to minimise the cross-entropy (temperature scaling, Guo et al., 2017).

    Query probabilities stay low, because the focal loss has small gradients for queries that are already correct. A
    detection counts from a score of 0.5, and the score is the product of query probability and presence. Each factor is
    folded into a linear layer of its head. The order of query logits does not change.

    Args:
        model: The detector in eval mode.
        scenes: Number of scenes.

    Returns:
        The factors.
    """
    queries: list[Tensor] = []
    wanted: list[Tensor] = []
    presence: list[Tensor] = []
    there: list[Tensor] = []
    rng = np.random.default_rng((TRAIN_SEED, FIRST_SCENE))
    for start in range(0, scenes, AT_ONCE):
        numbers = range(FIRST_SCENE + start, FIRST_SCENE + min(start + AT_ONCE, scenes))
        rendered = render_scenes(numbers, IMAGE_SIZE, TRAIN_SEED, device=model.device)
        questions = draw_questions(rendered, PER_SCENE, rng, boxes=False)
        found = ask_scenes(model, rendered, questions)
        slots = questions.slots.to(model.device)
        truth = (masks_to_boxes(rendered.masks) / IMAGE_SIZE)[questions.prompts.image.to(model.device)]
        positive = slots.any(1)
        matched = assign(found.pred_logits, found.pred_boxes, truth, slots).matched(found.pred_logits.shape[1])
        queries.append(found.pred_logits[positive].flatten())
        wanted.append(matched[positive].flatten().float())
        presence.append(found.presence_logits[:, 0])
        there.append(positive.float())
    factors = Factors(_best(torch.cat(queries), torch.cat(wanted)), _best(torch.cat(presence), torch.cat(there)))
    scoring, presence_head = model.dot_product_scoring.query_proj, model.detr_decoder.presence_head.layer3
    for layer, factor in ((scoring, factors.query), (presence_head, factors.presence)):
        layer.weight.mul_(factor)
        layer.bias.mul_(factor)
    return factors


def _best(logits: Float[Tensor, " n"], target: Float[Tensor, " n"]) -> float:
    """Return the factor between 1/4 and 8 with the lowest cross-entropy."""
    factors = torch.logspace(-2, 3, 101, base=2.0)
    losses = [F.binary_cross_entropy_with_logits(logits * factor, target) for factor in factors.tolist()]
    return float(factors[int(torch.stack(losses).argmin())])
