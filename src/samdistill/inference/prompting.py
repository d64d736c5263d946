"""The prompting protocol: how a promptable model is asked for known objects. One implementation for every figure.

Box: the object's tight box. Point: the pixel deepest inside it. Refine: that point, then one corrective click at
the centre of the model's own deeper error region, with its own last logits as mask prompt (RITM, Sofiiuk et al.,
2021; SAM, Kirillov et al., 2023). Refine2: a second one after it. All of it happens on the model's square canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..data.prompts import box_prompts, point_prompts
from ..ops.masks import error_points
from ..ops.promptable import Embeddings, Promptable, predict, to_canvas
from ..types import Prompts

PromptKind = Literal["box", "point", "refine", "refine2"]
KINDS: tuple[PromptKind, ...] = get_args(PromptKind)
PROMPTS: tuple[PromptKind, ...] = ("box", "point", "refine")
"""What is asked unless something else is wanted."""
_CLICKED: tuple[PromptKind, ...] = ("point", "refine", "refine2")  # each goes on from the one before
_PIXELS_AT_ONCE = 2**24  # 16 prompts at 1008 px: the decoder's upscaled maps and the float canvas masks stay below 1 GB


def prompts_at_once(images: int, size: tuple[int, int]) -> int:
    """Prompts per image that a batch of ``images`` canvases can ask in one call without filling the memory."""
    return max(1, _PIXELS_AT_ONCE // (images * size[0] * size[1]))


@dataclass(frozen=True)
class Targets:
    """Objects to be asked for, and the prompts that open the dialogue; these depend on no model and are made once.

    masks: on the canvas. inside: where the canvas shows the image; what a model paints on padding is discarded, as a
    user never sees it. None: everywhere.
    """

    masks: Bool[Tensor, "b n h w"]
    box: Prompts
    point: Prompts
    inside: Bool[Tensor, "b 1 h w"] | None = None

    @classmethod
    def of(
        cls,
        masks: Bool[Tensor, "b n h w"],
        valid: Bool[Tensor, "b n"],
        inside: Bool[Tensor, "b h w"] | None = None,
    ) -> Targets:
        """Targets for ``masks``; ``valid`` is False for slots that only pad the batch."""
        shown = None if inside is None else inside[:, None]
        return cls(masks, box_prompts(masks, valid), point_prompts(masks, valid), shown)

    @property
    def valid(self) -> Bool[Tensor, "b n"]:
        return self.box.valid

    def __len__(self) -> int:
        """Slots per image, padding included."""
        return self.masks.shape[1]

    def part(self, start: int, stop: int) -> Targets:
        """Objects ``start`` to ``stop`` of every image."""
        at = (slice(None), slice(start, stop))
        return Targets(self.masks[at], _pick(self.box, at), _pick(self.point, at), self.inside)

    def one_image(self, index: int, most: int) -> Targets:
        """The first ``most`` real objects of one image, as a batch of one without padding."""
        at = (torch.tensor([[index]]), self.valid[index].nonzero()[:most, 0][None].cpu())
        inside = None if self.inside is None else self.inside[index : index + 1]
        return Targets(self.masks[at], _pick(self.box, at), _pick(self.point, at), inside)


def _pick(prompts: Prompts, at: tuple[slice | Tensor, slice | Tensor]) -> Prompts:
    """Some of the slots of every tensor."""
    values = (getattr(prompts, f.name) for f in fields(prompts))
    return Prompts(*(None if value is None else value[at] for value in values))


def refined_prompts(
    first: Prompts,
    logits: Float[Tensor, "b n h w"],
    predicted: Bool[Tensor, "b n H W"],
    masks: Bool[Tensor, "b n H W"],
) -> Prompts:
    """``first``'s points plus one corrective click each, and ``logits`` as mask prompt."""
    if first.points is None or first.labels is None:
        raise ValueError("a corrective click follows a point prompt")
    click, label = error_points(predicted.flatten(0, 1), masks.flatten(0, 1))
    shape = (*masks.shape[:2], 1)
    return Prompts(
        first.valid,
        points=torch.cat([first.points, click.view(*shape, 2).float()], 2),
        labels=torch.cat([first.labels, label.view(shape)], 2),
        masks=logits,
    )


@torch.no_grad()
def prompted_masks(
    model: Promptable, embeddings: Embeddings, targets: Targets, kinds: Sequence[PromptKind] = PROMPTS
) -> dict[PromptKind, Bool[Tensor, "b n h w"]]:
    """The model's canvas masks for each kind of prompt; slots that are not valid hold anything."""
    size = targets.masks.shape[-2:]

    def ask(prompts: Prompts) -> tuple[Tensor, Tensor]:
        logits = predict(model, embeddings, prompts).best()[0]
        masks = to_canvas(logits, size)
        return logits, masks if targets.inside is None else masks & targets.inside

    found: dict[PromptKind, Tensor] = {}
    if "box" in kinds:
        found["box"] = ask(targets.box)[1]
    last = max((_CLICKED.index(kind) for kind in kinds if kind in _CLICKED), default=-1)
    prompts = targets.point
    for number, kind in enumerate(_CLICKED[: last + 1]):
        logits, found[kind] = ask(prompts)
        if number < last:
            prompts = refined_prompts(prompts, logits, found[kind], targets.masks)
    return {kind: found[kind] for kind in kinds}
