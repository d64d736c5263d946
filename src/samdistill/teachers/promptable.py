"""A complete promptable SAM as a teacher of prompt distillation.

It can be any checkpoint that ``checkpoints.promptable`` opens: SAM, MobileSAM, or a SAM 3 tracker with its own or a
student's trunk.
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
"""The published tap is ``vision_encoder.layers[30]`` of ViT-H, which has 32 layers."""
_WIDTH_TERMS = ("prompt_embed", "decoder_mask_token")


class PromptTeacher:
    """A frozen promptable model that gives the four signals of prompt distillation.

    Images and prompts are on the student's canvas. The image encoder runs in the precision of the entry, with weights
    kept in float32. Prompt encoder and mask decoder, about 1% of the work, run in float32, because half precision moves
    points by pixels.

    Attributes:
        name: Name of the entry.
        weight: Weight of the entry.
        image_size: Side of the teacher's own canvas in pixels.
        grid: Rows and columns of the image embedding.
        width: Channels of the image embedding and of the mask tokens.
        patch_channels: Channels of the tap, see ``patches``.
        projection: Projection of the tap's channels to those of ``encoder_patch``, made by ``fit_projection``.
        fingerprint: Hex digest of weights, settings, image size and precision. Teachers with the same fingerprint and
            projection give the same signals.

    Raises:
        UserError: The checkpoint cannot be opened, or not at the entry's image size.
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
        """The projection.

        Raises:
            ValueError: ``projection`` is not set.
        """
        if self.projection is None:
            raise ValueError(f"teacher {self.name!r} has no projection yet: fit_projection gives one")
        return self.projection

    def patches(self, images: ImageBatch) -> Float[Tensor, "b d gh gw"]:
        """Return the output of the tapped layer, float32 without gradient.

        In the ViT of SAM and SAM 3 the tap is 30/31 of the way through the layers, which is ``layers[30]`` in ViT-H.
        For other trunks it is the output.
        """
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            found = self._encode(images)[1]
        return _free(found)

    def answer(self, images: ImageBatch, groups: tuple[PromptGroup, ...], dense: bool = True) -> PromptSignals:
        """Return the signals of every group in order, float32 without gradient, for use in a loss.

        Images are resized to the teacher's canvas, points and boxes are scaled, and mask prompts are resized to the
        resolution of its decoder. Each image is encoded once.

        Args:
            images: Images on the student's square canvas.
            groups: Prompts on the student's canvas.
            dense: Return mask logits and IoU scores too.

        Raises:
            ValueError: ``projection`` is not set.
        """
        projection = self.projected
        ratio = self.image_size / images.images.shape[-1]
        low_res = (4 * self.grid[0], 4 * self.grid[1])
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            embeddings, patches = self._encode(images)
            patch = projection.apply(patches)
            answers = [
                answer_group(self.model, embeddings, replace(group, prompts=moved(group.prompts, ratio, low_res)))
                for group in (group.to(self.device) for group in groups)
            ]
        return PromptSignals(_free(patch), tuple(_kept(signals, dense) for signals in answers))

    def to(self, device: torch.device | str) -> PromptTeacher:
        """Move model and projection to ``device``. Does nothing if they are there."""
        if torch.device(device) != self.device:
            self.device = torch.device(device)
            self.model.to(self.device)
            self.projection = None if self.projection is None else self.projection.to(self.device)
        return self

    def _encode(self, images: ImageBatch) -> tuple[Embeddings, Float[Tensor, "b d gh gw"]]:
        """Return embeddings and patch features in float32. The caller sets inference mode."""
        batch = on_canvas(images.to(self.device), self.image_size)
        dtype = DTYPES[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32), _outputs(self._tap) as seen:
            found = embed(self.model, batch)
        embeddings = Embeddings(tuple(level.float() for level in found.levels), found.trunk.float())
        return embeddings, seen[0].permute(0, 3, 1, 2).float() if seen else embeddings.trunk


def fit_projection(
    teacher: PromptTeacher, batches: Iterable[ImageBatch], channels: int, standardise: bool
) -> Projection:
    """Fit a projection of the teacher's patch features on the cells that are not padding.

    The caller assigns it to ``teacher.projection``. Raises the errors of ``Projection.fit``.

    Args:
        teacher: The teacher.
        batches: Images to fit on.
        channels: Channels of the projection, fewer if the teacher has fewer.
        standardise: Standardise the projected channels, see ``Projection``.
    """
    samples = (
        teacher.patches(batch).permute(0, 2, 3, 1)[batch.valid(teacher.grid).to(teacher.device)] for batch in batches
    )
    return Projection.fit(samples, channels, standardise).to(teacher.device)


class Described(Protocol):
    """The attributes of a running or cached teacher that ``check_match`` uses."""

    name: str
    grid: tuple[int, int]
    width: int


def check_match(grid: tuple[int, int], width: int, terms: Sequence[str], teacher: Described) -> None:
    """Check that a student can be trained with the enabled terms of a teacher.

    The decoder's terms compare channel by channel, so the widths must be equal. The grids may differ by a factor of 2;
    beyond that, resizing would compare different content.

    Args:
        grid: Rows and columns of the student's image embedding.
        width: Channels of the student's image embedding.
        terms: Enabled distillation terms.
        teacher: The teacher.

    Raises:
        UserError: The widths differ, or the grids differ by more than a factor of 2.
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
    """Resize a batch with a square canvas to ``side`` pixels. A batch of that size is returned unchanged."""
    height, width = images.images.shape[-2:]
    if height != width:
        raise ValueError(f"a canvas of {height} x {width} is not square")
    if width == side:
        return images
    pixels = F.interpolate(images.images.float(), (side, side), mode="bilinear", align_corners=False, antialias=True)
    sizes = (images.sizes * (side / width)).round().clamp(1, side).to(images.sizes.dtype)
    return replace(images, images=pixels.round().clamp(0, 255).to(torch.uint8), sizes=sizes)


def moved(prompts: Prompts, ratio: float, low_res: tuple[int, int]) -> Prompts:
    """Scale prompts to a canvas ``ratio`` times as large, and resize mask prompts to ``low_res``.

    Boxes are pixel edges. Points are pixel indices, and the centre of a pixel is half a pixel further.
    """
    points, boxes, masks = prompts.points, prompts.boxes, prompts.masks
    if ratio != 1:
        points = None if points is None else (points + 0.5) * ratio - 0.5
        boxes = None if boxes is None else boxes * ratio
    if masks is not None and masks.shape[-2:] != low_res:
        masks = F.interpolate(masks, low_res, mode="bilinear", align_corners=False)
    return replace(prompts, points=points, boxes=boxes, masks=masks)


def _tapped_layer(model: Promptable) -> nn.Module | None:
    """Return the ViT layer whose output (channels last) is the patch feature, or None for another trunk."""
    encoder = model.vision_encoder
    if isinstance(model, Sam3TrackerModel):
        layers = encoder.backbone.layers if isinstance(encoder.backbone, Sam3ViTModel) else None
    else:
        layers = getattr(encoder, "layers", None)  # MobileSAM's encoder has a timm network instead of layers
    return None if layers is None else layers[_PUBLISHED_TAP * (len(layers) - 1) // (_PUBLISHED_DEPTH - 1)]


@contextmanager
def _outputs(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect the outputs of ``module`` inside the context; none if it is None."""
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
    """Copy outside inference mode, because autograd cannot save an inference tensor for a backward pass."""
    return tensor.to(torch.float32, copy=True).contiguous()


def _kept(signals: GroupSignals, dense: bool) -> GroupSignals:
    masks, scores = (signals.low_res_masks, signals.iou_scores) if dense else (None, None)
    return GroupSignals(
        _free(signals.prompt_embed), _free(signals.mask_tokens), None if masks is None else _free(masks),
        None if scores is None else _free(scores),
    )  # fmt: skip
