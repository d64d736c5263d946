"""The prompting protocol: prompts derived from ground-truth masks, for evaluation and sandbox training.

- ``box``: the tight bounding box of the object.
- ``point``: the pixel of the object that is farthest from its outline.
- ``refine``: ``point``, followed by one corrective click at the centre of the deeper error region of the predicted
  mask (see ``ops.masks.error_points``). The logits of the previous prediction are the mask prompt (RITM, Sofiiuk et
  al., 2021; SAM, Kirillov et al., 2023).
- ``refine2``: ``refine``, followed by a second corrective click.

All coordinates are on the model's square canvas.
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
"""The kinds of prompts used by default."""
_CLICKED: tuple[PromptKind, ...] = ("point", "refine", "refine2")  # each continues the one before
_PIXELS_AT_ONCE = 2**24  # 16 prompts at 1008 px, so that upscaled maps and float canvas masks stay below 1 GB


def prompts_at_once(images: int, size: tuple[int, int]) -> int:
    """Return the number of prompts per image for one decoder call on ``images`` canvases, limited by memory."""
    return max(1, _PIXELS_AT_ONCE // (images * size[0] * size[1]))


@dataclass(frozen=True)
class Targets:
    """Ground-truth objects and their initial prompts. The prompts do not depend on a model and are computed once.

    Attributes:
        masks: Ground-truth masks on the canvas, (b, n, h, w).
        box: Box prompts.
        point: Point prompts.
        inside: Part of the canvas that is not padding, (b, 1, h, w), or None for all of it. Predictions on padding are
            discarded, as they are not part of the image.
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
        """Compute the prompts of ``masks``. ``valid`` is False for padded slots."""
        shown = None if inside is None else inside[:, None]
        return cls(masks, box_prompts(masks, valid), point_prompts(masks, valid), shown)

    @property
    def valid(self) -> Bool[Tensor, "b n"]:
        return self.box.valid

    def __len__(self) -> int:
        """Number of slots per image, including padded ones."""
        return self.masks.shape[1]

    def part(self, start: int, stop: int) -> Targets:
        """Return slots ``start`` to ``stop`` (exclusive) of every image."""
        at = (slice(None), slice(start, stop))
        return Targets(self.masks[at], _pick(self.box, at), _pick(self.point, at), self.inside)

    def one_image(self, index: int, most: int) -> Targets:
        """Return the first ``most`` valid objects of one image as a batch of one without padded slots."""
        at = (torch.tensor([[index]]), self.valid[index].nonzero()[:most, 0][None].cpu())
        inside = None if self.inside is None else self.inside[index : index + 1]
        return Targets(self.masks[at], _pick(self.box, at), _pick(self.point, at), inside)


def _pick(prompts: Prompts, at: tuple[slice | Tensor, slice | Tensor]) -> Prompts:
    """Index the slots of every tensor."""
    values = (getattr(prompts, f.name) for f in fields(prompts))
    return Prompts(*(None if value is None else value[at] for value in values))


def refined_prompts(
    first: Prompts,
    logits: Float[Tensor, "b n h w"],
    predicted: Bool[Tensor, "b n H W"],
    masks: Bool[Tensor, "b n H W"],
) -> Prompts:
    """Append one corrective click per object to the points of ``first``, with ``logits`` as mask prompt.

    Args:
        first: The previous prompts, with points.
        logits: Low-res logits of the previous prediction.
        predicted: Masks of the previous prediction on the canvas.
        masks: Ground-truth masks on the canvas.

    Raises:
        ValueError: ``first`` has no points.
    """
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
    """Predict the masks on the canvas for each kind of prompt. The masks of padded slots are undefined."""
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
