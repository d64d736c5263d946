"""Training loss of the sandbox's detector on phrases and boxes for rendered scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, sigmoid_focal_loss
from transformers import Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from detector_model import HIDDEN
from detector_questions import Questions
from mask_objective import mask_bce, mask_dice
from samdistill.checkpoints.words import Words
from samdistill.losses.box import box_giou, box_l1
from samdistill.ops.boxes import giou
from samdistill.ops.images import normalise
from samdistill.ops.masks import masks_to_boxes
from samdistill.ops.matching import Matches, hungarian
from samdistill.ops.outputs import ask, recorded
from samdistill.sandbox.scenes import COLOURS, SHAPES, Scenes
from samdistill.types import ConceptPrompts, Term, Terms

ABSENT = 0.5
"""Weight of the query scores on prompts about absent concepts. Presence alone is sufficient for these, but learns
faster if the queries are trained on them too."""
WEIGHTS = {
    "naming": 4.0, "logit": 2.0, "l1": 5.0, "giou": 2.0, "presence": 2.0, "mask_bce": 5.0, "mask_dice": 2.0,
    "semantic_bce": 3.0, "semantic_dice": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """Logits, boxes (cxcywh, before the sigmoid) and presence of every decoder layer, and masks of the last layer."""

    logits: Float[Tensor, "l p q"]
    boxes: Float[Tensor, "l p q 4"]
    presence: Float[Tensor, "l p"]
    masks: Float[Tensor, "p q h w"]
    semantic: Float[Tensor, "p 1 h w"]


@dataclass(frozen=True)
class Lesson:
    """A batch of scenes with prompts.

    ``questions`` is None if only cells are classified. ``masks`` is whether masks are predicted and trained.
    """

    scenes: Scenes
    questions: Questions | None
    masks: bool


class ConceptLearner(nn.Module):
    """The detector with auxiliary heads that classify the shape and colour of every cell of two levels.

    The heads are used in training only. They give a dense training signal without the decoder that aligns image
    features with words. Without it, a phrase selects its object only after thousands of steps.
    """

    def __init__(self, model: Sam3Model, words: Words) -> None:
        super().__init__()
        self.model, self.words = model, words
        classes = len(SHAPES) + len(COLOURS) + 2
        self.naming = nn.ModuleList(nn.Conv2d(HIDDEN, classes, 1) for _ in range(2))

    def forward(
        self, images: Tensor, prompts: ConceptPrompts | None, masks: bool = True
    ) -> tuple[list[Float[Tensor, "b c _ _"]], Answer | None]:
        """Return the class logits of the cells of two levels (see ``naming_loss``), and the output for the prompts.

        Args:
            images: Images, uint8.
            prompts: The prompts, or None.
            masks: Whether masks are needed. Otherwise they are computed from a coarse map and are unusable, which
                saves half of a step's time.
        """
        vision = self.model.get_vision_features(normalise(images))
        named = [head(level) for head, level in zip(self.naming, vision.fpn_hidden_states[1:3], strict=True)]
        if prompts is None:
            return named, None
        return named, answer(self.model, vision if masks else _coarse(vision), self.words, prompts)


def _coarse(vision: Sam3VisionEncoderOutput) -> Sam3VisionEncoderOutput:
    """Replace the two finest levels, which only masks use, by the level that DETR reads."""
    coarse, last = vision.fpn_hidden_states[2:]
    place, end = vision.fpn_position_encoding[2:]
    return Sam3VisionEncoderOutput(
        fpn_hidden_states=(coarse, coarse, coarse, last), fpn_position_encoding=(place, place, place, end)
    )


def answer(model: Sam3Model, vision: Sam3VisionEncoderOutput, words: Words, prompts: ConceptPrompts) -> Answer:
    """Return the outputs of all decoder layers. transformers returns the last one only; the others are recorded."""
    asked = words.inputs(prompts, model.device)
    text = model.get_text_features(asked["input_ids"], asked["attention_mask"], return_dict=True).pooler_output
    with recorded(model.detr_decoder) as decoder, recorded(model.dot_product_scoring) as scoring:
        out = ask(
            model, vision, prompts.image.to(model.device), text, asked["attention_mask"], asked["input_boxes"],
            asked["input_boxes_labels"],
        )  # fmt: skip
    layers = decoder.output
    offsets = model.detr_decoder.box_head(layers.intermediate_hidden_states)
    boxes = torch.logit(layers.reference_boxes, eps=1e-3) + offsets
    return Answer(
        scoring.output.squeeze(-1), boxes, layers.presence_logits.squeeze(-1), out.pred_masks, out.semantic_seg
    )


def naming_loss(named: Sequence[Float[Tensor, "b c _ _"]], scenes: Scenes) -> Float[Tensor, ""]:
    """Return the cross-entropy of the shape and colour of each cell. The first class is the background.

    ``named`` has the logits of the shapes followed by those of the colours. The class of a cell is that of its centre.
    """
    codes = []
    for kind, table in ((0, SHAPES), (1, tuple(COLOURS))):
        numbers = torch.tensor([[table.index(names[kind]) + 1 for names in scene] for scene in scenes.concepts])
        codes.append((scenes.masks * numbers[..., None, None].to(scenes.masks.device)).sum(1))
    losses = []
    for logits in named:
        parts = logits.split([len(SHAPES) + 1, len(COLOURS) + 1], 1)
        for part, code in zip(parts, codes, strict=True):
            target = F.interpolate(code[:, None].float(), logits.shape[-2:], mode="nearest-exact")[:, 0].long()
            losses.append(F.cross_entropy(part, target))
    return torch.stack(losses).mean()


def concept_terms(found: Answer, scenes: Scenes, questions: Questions, masks: bool) -> dict[str, Float[Tensor, ""]]:
    """Compute set prediction losses as in DETR (Carion et al., 2020). Each decoder layer is matched separately.

    The result has the terms of ``WEIGHTS`` except ``naming`` and, if ``masks`` is False, those of masks. Terms of pairs
    are divided by the number of pairs of a query and an object. They are zero if there is no pair.
    """
    device = found.logits.device
    slots, image = questions.slots.to(device), questions.prompts.image.to(device)
    truth = (masks_to_boxes(scenes.masks) / scenes.masks.shape[-1])[image]
    boxes, count, layers = (
        box_convert(found.boxes.sigmoid(), "cxcywh", "xyxy"),
        slots.sum().clamp(min=1),
        len(found.logits),
    )
    positive = slots.any(1)
    share = torch.where(positive, 1.0, ABSENT)
    sums = {name: found.logits.new_zeros(()) for name in ("logit", "l1", "giou")}
    for logits, ours in zip(found.logits, boxes, strict=True):
        matches = assign(logits, ours, truth, slots)
        rows, queries, targets = matches.pairs
        wanted = matches.matched(logits.shape[1]).float()
        focal = sigmoid_focal_loss(logits, wanted, alpha=0.6, gamma=2.0)
        mine, theirs = ours[rows, queries], truth[rows, targets]
        sums["logit"] = sums["logit"] + (focal.sum(1) * share).sum() / count
        sums["l1"] = sums["l1"] + box_l1(mine, theirs).sum() / count
        sums["giou"] = sums["giou"] + box_giou(mine, theirs).sum() / count
    presence = F.binary_cross_entropy_with_logits(found.presence, positive.float().expand_as(found.presence))
    values = {name: total / layers for name, total in sums.items()} | {"presence": presence}
    return values | (_mask_terms(found, scenes.masks[image], slots, matches) if masks else {})


@torch.no_grad()
def assign(
    logits: Float[Tensor, "p q"], boxes: Float[Tensor, "p q 4"], truth: Float[Tensor, "p k 4"],
    slots: Bool[Tensor, "p k"],
) -> Matches:  # fmt: skip
    """Return the assignment of queries to the objects of each prompt with the lowest cost. Boxes are xyxy."""
    overlap = giou(boxes[:, :, None], truth[:, None])
    cost = 5 * torch.cdist(boxes, truth, p=1) - 2 * overlap - 2 * logits.sigmoid()[..., None]
    return hungarian(cost, slots)


def _mask_terms(
    found: Answer, masks: Bool[Tensor, "p k h w"], slots: Bool[Tensor, "p k"], matches: Matches
) -> dict[str, Float[Tensor, ""]]:
    """Return the mask terms of the last layer's pairs, and of the union of all objects of a prompt."""
    rows, queries, targets = matches.pairs
    picked = _resize(found.masks[rows, queries], masks.shape[-2:])
    wanted = masks[rows, targets].float()
    every = torch.ones(len(picked), dtype=torch.bool, device=picked.device)
    whole = _resize(found.semantic[:, 0], masks.shape[-2:])
    union = (masks & slots[..., None, None]).any(1).float()
    return {
        "mask_bce": mask_bce(picked, wanted, every), "mask_dice": mask_dice(picked, wanted, every),
        "semantic_bce": mask_bce(whole, union), "semantic_dice": mask_dice(whole, union, slots.any(1)),
    }  # fmt: skip


def _resize(masks: Float[Tensor, "n _ _"], size: Sequence[int]) -> Float[Tensor, "n h w"]:
    if not len(masks):  # interpolate refuses an empty batch
        return masks.new_zeros(0, *size)
    return F.interpolate(masks[:, None], tuple(size), mode="bilinear")[:, 0]


def detector_terms(learner: nn.Module, lesson: Lesson) -> Terms:
    """Return all terms of a batch. Terms that the batch does not train are zero."""
    prompts = None if lesson.questions is None else lesson.questions.prompts
    named, found = learner(lesson.scenes.images, prompts, lesson.masks)
    values = dict.fromkeys(WEIGHTS, named[0].new_zeros(()))
    values["naming"] = naming_loss(named, lesson.scenes)
    if found is not None and lesson.questions is not None:
        values |= concept_terms(found, lesson.scenes, lesson.questions, lesson.masks)
    return Terms({name: Term(value, WEIGHTS[name]) for name, value in values.items()})
