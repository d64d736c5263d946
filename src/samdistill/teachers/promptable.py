"""A whole promptable SAM as a teacher: images and prompts in, the four signals of prompt distillation out.

Any checkpoint that ``checkpoints.promptable`` opens: SAM, MobileSAM, a SAM 3 tracker with its own trunk or a student's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Sam3TrackerModel, Sam3ViTModel

from ..checkpoints.promptable import load_promptable
from ..config import TeacherEntry
from ..ops.pca import Projection
from ..ops.promptable import (
    Embeddings,
    Promptable,
    answer_group,
    decoder_width,
    embed,
    embedding_grid,
    image_size,
    statistics,
    trunk_channels,
)
from ..types import GroupSignals, ImageBatch, PromptGroup, Prompts, PromptSignals, UserError
from .base import DTYPES
from .loading import fingerprint, freeze, settings

_PUBLISHED_TAP, _PUBLISHED_DEPTH = 30, 32
"""The published tap: ``vision_encoder.layers[30]`` of ViT-H, which has 32 layers."""
_WIDTH_TERMS = ("prompt_embed", "decoder_mask_token")


class PromptTeacher:
    """A frozen promptable model that says what it makes of prompts about images on a student's canvas.

    name, weight: of its entry. image_size: side of its own canvas. grid: of its image embedding. width: channels of
    image embedding and mask tokens. patch_channels: of the tap that ``patches`` gives. projection: from those to what
    ``encoder_patch`` has; ``fit_projection`` makes one. fingerprint: hex digest of the weights, the settings, the size
    and the precision: two teachers that share it and their projection give the same signals.

    The image encoder runs in the entry's precision, with weights kept in float32. Prompt encoder and mask decoder, a
    hundredth of the work, run in float32: half precision moves a point by pixels.

    Raises ``UserError`` for a checkpoint that cannot be opened, or not at the entry's image size.
    """

    def __init__(self, entry: TeacherEntry, device: torch.device | str = "cpu") -> None:
        self.name, self.weight, self.precision = entry.name, entry.weight, entry.precision
        self.device = torch.device(device)
        model = load_promptable(entry.checkpoint, entry.image_size)
        freeze(model, torch.float32)
        self.image_size, self.grid, self.width = image_size(model), embedding_grid(model), decoder_width(model)
        self.patch_channels = trunk_channels(model)
        self.projection: Projection | None = None
        behaviour = {
            "kind": type(model).__name__, "model": settings(model.config.to_dict()), "precision": self.precision,
        }  # fmt: skip
        self.fingerprint = fingerprint(model, behaviour, self.image_size, *statistics(model))
        self._tap = _tapped_layer(model)
        self.model: Promptable = model.to(self.device)

    @property
    def projected(self) -> Projection:
        """``projection``; ``ValueError`` before it is set."""
        if self.projection is None:
            raise ValueError(f"teacher {self.name!r} has no projection yet: fit_projection gives one")
        return self.projection

    def patches(self, images: ImageBatch) -> Float[Tensor, "b d gh gw"]:
        """What the tap of the image encoder gives, float32 without gradient.

        The tap is 30/31 of the way through the layers of a ViT, SAM's or SAM 3's, which is ``layers[30]`` of ViT-H. Of
        any other trunk it is the output.
        """
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            found = self._encode(images)[1]
        return _free(found)

    def answer(self, images: ImageBatch, groups: tuple[PromptGroup, ...], dense: bool = True) -> PromptSignals:
        """The signals of every group, in order, as float32 without gradient, free to be used in a loss.

        images, groups: on the student's square canvas. They are brought to this teacher's own: images are resized,
        points and boxes moved, mask prompts resized to its decoder's resolution. Each image is encoded once. dense:
        keep mask logits and IoU scores. Raises ``ValueError`` before ``projection`` is set.
        """
        projection = self.projected
        ratio = self.image_size / images.images.shape[-1]
        low_res = (4 * self.grid[0], 4 * self.grid[1])
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            embeddings, patches = self._encode(images)
            patch = projection.apply(patches)
            said = [
                answer_group(self.model, embeddings, replace(group, prompts=moved(group.prompts, ratio, low_res)))
                for group in (group.to(self.device) for group in groups)
            ]
        return PromptSignals(_free(patch), tuple(_kept(signals, dense) for signals in said))

    def to(self, device: torch.device | str) -> PromptTeacher:
        """Move model and projection; a step whose teacher is there already costs nothing."""
        if torch.device(device) != self.device:
            self.device = torch.device(device)
            self.model.to(self.device)
            self.projection = None if self.projection is None else self.projection.to(self.device)
        return self

    def _encode(self, images: ImageBatch) -> tuple[Embeddings, Float[Tensor, "b d gh gw"]]:
        """Embeddings and patch features in float32, inside the caller's inference mode."""
        batch = on_canvas(images.to(self.device), self.image_size)
        dtype = DTYPES[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32), _outputs(self._tap) as seen:
            found = embed(self.model, batch)
        embeddings = Embeddings(tuple(level.float() for level in found.levels), found.trunk.float())
        return embeddings, seen[0].permute(0, 3, 1, 2).float() if seen else embeddings.trunk


def fit_projection(
    teacher: PromptTeacher, batches: Iterable[ImageBatch], channels: int, standardise: bool
) -> Projection:
    """A projection of the teacher's patch features to ``channels``, fitted on the cells that show images, not padding.

    It has fewer channels where the teacher has fewer. The caller sets it as ``teacher.projection``. Raises what
    ``Projection.fit`` raises.
    """
    samples = (
        teacher.patches(batch).permute(0, 2, 3, 1)[batch.valid(teacher.grid).to(teacher.device)] for batch in batches
    )
    return Projection.fit(samples, channels, standardise).to(teacher.device)


class Described(Protocol):
    """What ``check_match`` asks of a teacher, running or cached."""

    name: str
    grid: tuple[int, int]
    width: int


def check_match(grid: tuple[int, int], width: int, terms: Sequence[str], teacher: Described) -> None:
    """``UserError`` where a student cannot meet the teacher in the enabled ``terms``.

    grid, width: of the student's image embedding. The terms of the decoder compare channel with channel, so that they
    need equal widths. Grids may differ by a factor of 2, beyond which resizing one to the other compares other things.
    """
    unequal = [name for name in _WIDTH_TERMS if name in terms]
    if teacher.width != width and unequal:
        off = ", ".join(f"distillation.{name}.enable: false" for name in unequal)
        raise UserError(
            f"teacher {teacher.name!r} has a decoder of width {teacher.width} and the student one of {width}, which "
            f"{' and '.join(unequal)} cannot compare: set student.width: {teacher.width} (or start from a student of "
            f"that width), or {off}"
        )
    if terms and any(max(a, b) > 2 * min(a, b) for a, b in zip(grid, teacher.grid, strict=True)):
        ours, theirs = (" x ".join(map(str, side)) for side in (grid, teacher.grid))
        raise UserError(
            f"teacher {teacher.name!r} has an image embedding of {theirs} cells and the student one of {ours}, more "
            "than a factor of 2 apart: change image_size of one of them, or student.patch_size"
        )


def on_canvas(images: ImageBatch, side: int) -> ImageBatch:
    """The batch with its square canvas resized to ``side`` pixels; as it came where it has them already."""
    height, width = images.images.shape[-2:]
    if height != width:
        raise ValueError(f"a canvas of {height} x {width} is not square")
    if width == side:
        return images
    pixels = F.interpolate(images.images.float(), (side, side), mode="bilinear", align_corners=False, antialias=True)
    sizes = (images.sizes * (side / width)).round().clamp(1, side).to(images.sizes.dtype)
    return replace(images, images=pixels.round().clamp(0, 255).to(torch.uint8), sizes=sizes)


def moved(prompts: Prompts, ratio: float, low_res: tuple[int, int]) -> Prompts:
    """Prompts on a canvas ``ratio`` times as large, mask prompts at ``low_res``.

    Boxes are pixel edges. Points are indices of pixels, whose centres lie half a pixel further.
    """
    points, boxes, masks = prompts.points, prompts.boxes, prompts.masks
    if ratio != 1:
        points = None if points is None else (points + 0.5) * ratio - 0.5
        boxes = None if boxes is None else boxes * ratio
    if masks is not None and masks.shape[-2:] != low_res:
        masks = F.interpolate(masks, low_res, mode="bilinear", align_corners=False)
    return replace(prompts, points=points, boxes=boxes, masks=masks)


def _tapped_layer(model: Promptable) -> nn.Module | None:
    """The ViT's layer whose output, channels last, is the patch feature; None for another trunk."""
    encoder = model.vision_encoder
    if isinstance(model, Sam3TrackerModel):
        layers = encoder.backbone.layers if isinstance(encoder.backbone, Sam3ViTModel) else None
    else:
        layers = getattr(encoder, "layers", None)  # MobileSAM's encoder has a timm network in their place
    return None if layers is None else layers[_PUBLISHED_TAP * (len(layers) - 1) // (_PUBLISHED_DEPTH - 1)]


@contextmanager
def _outputs(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """What ``module`` returns meanwhile; nothing for None."""
    seen: list[Tensor] = []
    if module is None:
        yield seen
        return
    hook = module.register_forward_hook(lambda _, args, result: seen.append(result))
    try:
        yield seen
    finally:
        hook.remove()


def _free(tensor: Tensor) -> Tensor:
    """A copy made outside inference mode: an inference tensor cannot be saved for a loss's backward pass."""
    return tensor.to(torch.float32, copy=True).contiguous()


def _kept(signals: GroupSignals, dense: bool) -> GroupSignals:
    masks, scores = (signals.low_res_masks, signals.iou_scores) if dense else (None, None)
    return GroupSignals(
        _free(signals.prompt_embed), _free(signals.mask_tokens), None if masks is None else _free(masks),
        None if scores is None else _free(scores),
    )  # fmt: skip
