"""Data types that data, teachers, students, losses and the engine exchange."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from .errors import UserError as UserError

Features = dict[str, Tensor]
"""Tensor by tap name. Each teacher documents the layout of its taps."""


class _Movable:
    def to(self, device: torch.device | str):
        """Return a copy with all tensors, also nested ones, on ``device``."""
        return type(self)(*(_moved(getattr(self, f.name), device) for f in fields(self)))  # type: ignore[arg-type]


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, _Movable) else value


@dataclass(frozen=True)
class ImageBatch(_Movable):
    """A batch of uint8 images on canvases of one size, with padding only at the bottom and at the right.

    Attributes:
        images: RGB, 0..255.
        sizes: Height and width in pixels of the part that is not padding.
        original_sizes: Height and width of the image file in pixels.
        keys: Name of each image, unique in its data set.
        seeds: Seeds that reproduce the augmentation of each view.

    Example:
        >>> batch = ImageBatch.full(torch.zeros(2, 3, 1008, 1008, dtype=torch.uint8))
        >>> batch.valid((72, 72)).all()
        tensor(True)
    """

    images: UInt8[Tensor, "b 3 h w"]
    sizes: Int[Tensor, "b 2"]
    original_sizes: Int[Tensor, "b 2"]
    keys: tuple[str, ...]
    seeds: Int[Tensor, " b"]

    def __len__(self) -> int:
        return self.images.shape[0]

    @classmethod
    def full(cls, images: UInt8[Tensor, "b 3 h w"], keys: tuple[str, ...] | None = None) -> ImageBatch:
        """Create a batch without padding or augmentation. Default keys are ``0``, ``1`` and so on."""
        count, size = images.shape[0], torch.tensor(images.shape[-2:])
        sizes = size.expand(count, 2)
        names = keys if keys is not None else tuple(str(i) for i in range(count))
        return cls(images, sizes, sizes, names, torch.zeros(count, dtype=torch.int64))

    def valid(self, grid: tuple[int, int]) -> Bool[Tensor, "b gh gw"]:
        """Return which cells of a grid over the canvas have their centre on the image, not on padding.

        Args:
            grid: Height and width of the grid in cells.
        """
        height, width = self.images.shape[-2:]
        rows = (torch.arange(grid[0], device=self.sizes.device) + 0.5) * (height / grid[0])
        columns = (torch.arange(grid[1], device=self.sizes.device) + 0.5) * (width / grid[1])
        return (rows[None, :, None] < self.sizes[:, 0, None, None]) & (
            columns[None, None, :] < self.sizes[:, 1, None, None]
        )


@dataclass(frozen=True)
class Prompts(_Movable):
    """Prompts for n objects in each of b images. Coordinates are pixels of the model's input canvas.

    Attributes:
        valid: False for slots that are padding.
        points: Points as x, y.
        labels: 1 for positive points, 0 for negative ones, -10 for padding.
        boxes: Boxes as xyxy.
        masks: Logits of an earlier prediction at the decoder's resolution.
    """

    valid: Bool[Tensor, "b n"]
    points: Float[Tensor, "b n p 2"] | None = None
    labels: Int[Tensor, "b n p"] | None = None
    boxes: Float[Tensor, "b n 4"] | None = None
    masks: Float[Tensor, "b n h w"] | None = None


@dataclass(frozen=True)
class PromptGroup(_Movable):
    """Images of a batch whose prompts have the same form, so that no prompt needs padding.

    Attributes:
        rows: Indices of the images, ascending.
        prompts: Prompts for n objects of each image.
        multimask: Predict three masks for an ambiguous prompt instead of one.
    """

    rows: Int[Tensor, " g"]
    prompts: Prompts
    multimask: bool


@dataclass(frozen=True)
class GroupSignals(_Movable):
    """Predictions of a promptable SAM for a ``PromptGroup``, and features of its decoder.

    Attributes:
        prompt_embed: Image embedding at the input of the first two-way block, including the dense prompt embedding. k
            is n if the prompts have masks. Otherwise k is 1, because it is the same for all objects.
        mask_tokens: The four mask tokens after the two-way transformer.
        low_res_masks: Mask logits. m is 3 with multimask, else 1. None if not kept.
        iou_scores: Predicted IoU of each mask. None if not kept.
    """

    prompt_embed: Float[Tensor, "g k c gh gw"]
    mask_tokens: Float[Tensor, "g n t c"]
    low_res_masks: Float[Tensor, "g n m h w"] | None = None
    iou_scores: Float[Tensor, "g n m"] | None = None


@dataclass(frozen=True)
class PromptSignals(_Movable):
    """The four signals of prompt distillation for a batch.

    Attributes:
        encoder_patch: Features of the image encoder before its neck, projected to the same channels in student and
            teachers.
        groups: Signals of each group, in the order of the batch's groups.
    """

    encoder_patch: Float[Tensor, "b c gh gw"]
    groups: tuple[GroupSignals, ...]


VISUAL = "visual"
"""Text that SAM 3's processor uses for a prompt with boxes only (transformers, ``processing_sam3``)."""


@dataclass(frozen=True)
class ConceptPrompts(_Movable):
    """p questions about the images of a batch. An image may have several.

    Text is not tokenized here, because each model has its own tokenizer.

    Attributes:
        texts: A noun phrase per question.
        image: Index of the question's image, ascending.
        boxes: Exemplar boxes, normalised cxcywh of the canvas. k may be 0.
        labels: 1 for positive exemplars, 0 for negative ones, -10 for padding.

    Example:
        >>> ConceptPrompts.words(["a dog", "a red car"], image=[0, 1])
    """

    texts: tuple[str, ...]
    image: Int[Tensor, " p"]
    boxes: Float[Tensor, "p k 4"]
    labels: Int[Tensor, "p k"]

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def words(cls, texts: Sequence[str], image: Sequence[int]) -> ConceptPrompts:
        """Create questions without exemplar boxes.

        Args:
            texts: A noun phrase per question.
            image: Index of the question's image, ascending.
        """
        return cls(
            tuple(texts), torch.tensor(image, dtype=torch.int64), torch.zeros(len(texts), 0, 4),
            torch.zeros(len(texts), 0, dtype=torch.int64),
        )  # fmt: skip


@dataclass(frozen=True)
class DetectorOutput:
    """Predictions of a concept detector for p questions on b images, and three of its features.

    Attributes:
        pred_masks: Mask logits of q queries.
        pred_boxes: Boxes, normalised xyxy, not clamped.
        pred_logits: Logit of each query.
        presence_logits: Logit of the concept being in the image.
        semantic_seg: Mask logits of all instances together.
        fpn: The three levels that the heads read, finest first, per image.
        encoder: Tokens of the DETR encoder as a grid, per question. None for an exported model.
        trunk: Output of the ViT, or of the trunk in its place, per image. None where no loss needs it.
    """

    pred_masks: Float[Tensor, "p q h w"]
    pred_boxes: Float[Tensor, "p q 4"]
    pred_logits: Float[Tensor, "p q"]
    presence_logits: Float[Tensor, "p 1"]
    semantic_seg: Float[Tensor, "p 1 h w"]
    fpn: tuple[Float[Tensor, "b c _ _"], ...]
    encoder: Float[Tensor, "p c gh gw"] | None
    trunk: Float[Tensor, "b d gh gw"] | None = None

    @property
    def scores(self) -> Float[Tensor, "p q"]:
        """Score of each query in 0..1: its probability times that of the concept's presence, as in SAM 3."""
        return self.pred_logits.float().sigmoid() * self.presence_logits.float().sigmoid()


@dataclass(frozen=True)
class ObjectTruth(_Movable):
    """Ground truth of p questions, padded to n objects. A question may have no object.

    Attributes:
        masks: Share of each cell that the object covers, 0..1.
        boxes: Normalised xyxy.
        valid: False for slots that are padding.
    """

    masks: Float[Tensor, "p n h w"]
    boxes: Float[Tensor, "p n 4"]
    valid: Bool[Tensor, "p n"]


@dataclass(frozen=True)
class QuestionLabels(_Movable):
    """Annotated objects of p questions, padded to n objects. The masks of all m objects are packed.

    Attributes:
        masks: Share of each cell of the canvas that the object covers, 0..255, in the order of ``valid``.
        boxes: Normalised xyxy.
        valid: False for slots that are padding.
        known: Whether the annotations tell if an object of the question is in the image. Without that, no label.
        present: Whether an object of the question is in the image. It may have no mask, as in a crowd.
        complete: Whether all objects of the question are annotated, so that a query without an object is wrong.
    """

    masks: UInt8[Tensor, "m s s"]
    boxes: Float[Tensor, "p n 4"]
    valid: Bool[Tensor, "p n"]
    known: Bool[Tensor, " p"]
    present: Bool[Tensor, " p"]
    complete: Bool[Tensor, " p"]


@dataclass(frozen=True)
class Term:
    """A loss term: a scalar and its weight in the total."""

    value: Float[Tensor, ""]
    weight: float


class Terms(Mapping[str, Term]):
    """Named, weighted loss terms. ``total`` is minimised. Every term is logged by its name."""

    def __init__(self, terms: Mapping[str, Term]) -> None:
        self._terms = dict(terms)

    def __getitem__(self, name: str) -> Term:
        return self._terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)

    def __str__(self) -> str:
        return "  ".join(f"{name} {term.value.item():.4g} x {term.weight:g}" for name, term in self.items())

    @property
    def total(self) -> Float[Tensor, ""]:
        """Weighted sum of the terms."""
        return torch.stack([term.value * term.weight for term in self._terms.values()]).sum()

    def only(self, names: Collection[str]) -> Terms:
        """Return the terms with these names. A term ``name/teacher`` of several teachers is selected by ``name``."""
        return Terms({name: term for name, term in self._terms.items() if name.partition("/")[0] in names})

    def scaled(self, factors: Mapping[str, Float[Tensor, ""]]) -> Terms:
        """Multiply each value by the factor of its name, or by 1 if there is none.

        A term ``name/teacher`` uses the factor of ``name``.
        """
        found = ((name, term, factors.get(name.partition("/")[0], 1.0)) for name, term in self.items())
        return Terms({name: Term(term.value * factor, term.weight) for name, term, factor in found})

    def nonfinite(self) -> list[str]:
        """Return the names of the terms that are NaN or infinite."""
        return [name for name, term in self._terms.items() if not bool(torch.isfinite(term.value.detach()))]
