"""The currency of the rooms: what data, teachers, students, losses and the engine hand each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from .errors import UserError as UserError

Features = dict[str, Tensor]
"""Tap name to tensor; each teacher documents the layout of its taps."""


class _Movable:
    def to(self, device: torch.device | str):
        """A copy with every tensor on ``device``, however deep."""
        return type(self)(*(_moved(getattr(self, f.name), device) for f in fields(self)))  # type: ignore[arg-type]


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, _Movable) else value


@dataclass(frozen=True)
class ImageBatch(_Movable):
    """Images as they travel: uint8, one canvas size, padding at the bottom and the right only.

    images: RGB, 0..255. sizes: height and width of the part that is not padding. original_sizes: of the file.
    keys: one name per image, unique in its data set. seeds: what replays the augmentation of this view.
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
        """A batch without padding or augmentation."""
        count, size = images.shape[0], torch.tensor(images.shape[-2:])
        sizes = size.expand(count, 2)
        names = keys if keys is not None else tuple(str(i) for i in range(count))
        return cls(images, sizes, sizes, names, torch.zeros(count, dtype=torch.int64))

    def valid(self, grid: tuple[int, int]) -> Bool[Tensor, "b gh gw"]:
        """Cells of a ``grid`` laid over the canvas whose centre lies on the image, not on padding."""
        height, width = self.images.shape[-2:]
        rows = (torch.arange(grid[0], device=self.sizes.device) + 0.5) * (height / grid[0])
        columns = (torch.arange(grid[1], device=self.sizes.device) + 0.5) * (width / grid[1])
        return (rows[None, :, None] < self.sizes[:, 0, None, None]) & (
            columns[None, None, :] < self.sizes[:, 1, None, None]
        )


@dataclass(frozen=True)
class Prompts(_Movable):
    """Prompts for n objects in each of b images, in pixels of the model's input canvas.

    points: x, y; labels: 1 inside, 0 outside, -10 padding; boxes: xyxy; masks: logits of an earlier prediction at
    the decoder's resolution; valid: False for slots that only pad the batch.
    """

    valid: Bool[Tensor, "b n"]
    points: Float[Tensor, "b n p 2"] | None = None
    labels: Int[Tensor, "b n p"] | None = None
    boxes: Float[Tensor, "b n 4"] | None = None
    masks: Float[Tensor, "b n h w"] | None = None


@dataclass(frozen=True)
class PromptGroup(_Movable):
    """Images of a batch that are asked in one way, so that no prompt has to be padded.

    rows: which images, ascending. prompts: about n objects of each. multimask: ask for the three masks of an ambiguous
    prompt, else for one.
    """

    rows: Int[Tensor, " g"]
    prompts: Prompts
    multimask: bool


@dataclass(frozen=True)
class GroupSignals(_Movable):
    """What a promptable SAM says to one ``PromptGroup``, and what its decoder computed on the way.

    prompt_embed: the image embedding as it enters the first two-way block, dense prompt embedding added; k is n where
    the prompts hold masks, else 1, since it is then the same for all. mask_tokens: the four mask tokens after the
    two-way transformer. low_res_masks: logits; m is 1, or 3 with multimask. None where they were not kept.
    """

    prompt_embed: Float[Tensor, "g k c gh gw"]
    mask_tokens: Float[Tensor, "g n t c"]
    low_res_masks: Float[Tensor, "g n m h w"] | None = None
    iou_scores: Float[Tensor, "g n m"] | None = None


@dataclass(frozen=True)
class PromptSignals(_Movable):
    """The four signals of prompt distillation for a batch; ``groups`` in the order of the batch's.

    encoder_patch: features of the image encoder before its neck, brought to the same channels in student and teachers.
    """

    encoder_patch: Float[Tensor, "b c gh gw"]
    groups: tuple[GroupSignals, ...]


VISUAL = "visual"
"""What SAM 3's processor puts in place of words where a prompt is boxes alone (transformers, ``processing_sam3``)."""


@dataclass(frozen=True)
class ConceptPrompts(_Movable):
    """p questions about the images of a batch, several per image allowed.

    Words travel as text, as images travel as uint8: each model tokenises for itself. texts: a noun phrase per question.
    image: which image of the batch, ascending. boxes: exemplars, normalised cxcywh of the canvas; labels: 1 like this,
    0 not like this, -10 padding; k may be 0.
    """

    texts: tuple[str, ...]
    image: Int[Tensor, " p"]
    boxes: Float[Tensor, "p k 4"]
    labels: Int[Tensor, "p k"]

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def words(cls, texts: Sequence[str], image: Sequence[int]) -> ConceptPrompts:
        """Questions in words alone."""
        return cls(
            tuple(texts), torch.tensor(image, dtype=torch.int64), torch.zeros(len(texts), 0, 4),
            torch.zeros(len(texts), 0, dtype=torch.int64),
        )  # fmt: skip


@dataclass(frozen=True)
class DetectorOutput:
    """What a concept detector answers to p questions about b images, and the features it answered from.

    pred_masks: logits. pred_boxes: normalised xyxy, not clamped. pred_logits: of each query. presence_logits: of the
    concept being in the image at all. semantic_seg: logits of all instances together. fpn: per image, finest first, the
    three levels that the heads read. encoder: the DETR encoder's tokens as a grid, per question.
    """

    pred_masks: Float[Tensor, "p q h w"]
    pred_boxes: Float[Tensor, "p q 4"]
    pred_logits: Float[Tensor, "p q"]
    presence_logits: Float[Tensor, "p 1"]
    semantic_seg: Float[Tensor, "p 1 h w"]
    fpn: tuple[Float[Tensor, "b c _ _"], ...]
    encoder: Float[Tensor, "p c gh gw"]

    @property
    def scores(self) -> Float[Tensor, "p q"]:
        """Of each query: its own probability times the concept's presence, as SAM 3 scores its detections."""
        return self.pred_logits.float().sigmoid() * self.presence_logits.float().sigmoid()


@dataclass(frozen=True)
class ObjectTruth(_Movable):
    """What p questions should find, from annotations: n objects each, padded.

    masks: the share of each cell that the object covers, 0..1. boxes: normalised xyxy. valid: False for slots that only
    pad; a question may have no object at all.
    """

    masks: Float[Tensor, "p n h w"]
    boxes: Float[Tensor, "p n 4"]
    valid: Bool[Tensor, "p n"]


@dataclass(frozen=True)
class Term:
    """One loss term: a scalar value and the weight it enters the total with."""

    value: Float[Tensor, ""]
    weight: float


class Terms(Mapping[str, Term]):
    """Named, weighted loss terms. ``total`` is what is optimised; every name is logged."""

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
        return torch.stack([term.value * term.weight for term in self._terms.values()]).sum()

    def only(self, names: Sequence[str]) -> Terms:
        """The terms called ``names``. A term of several teachers is called ``name/teacher`` and goes with ``name``."""
        return Terms({name: term for name, term in self._terms.items() if name.partition("/")[0] in names})

    def scaled(self, factors: Mapping[str, Float[Tensor, ""]]) -> Terms:
        """Each value times the factor of its name, which ``name/teacher`` shares with ``name``; 1 for absent names."""
        found = ((name, term, factors.get(name.partition("/")[0], 1.0)) for name, term in self.items())
        return Terms({name: Term(term.value * factor, term.weight) for name, term, factor in found})

    def nonfinite(self) -> list[str]:
        """Names of the terms that are NaN or infinite."""
        return [name for name, term in self._terms.items() if not bool(torch.isfinite(term.value.detach()))]
