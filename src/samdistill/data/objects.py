"""Prompted objects of images: the training data of the prompt job, as items and batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from ..config import PromptsConfig
from ..types import ImageBatch, PromptGroup, Prompts, UserError
from .loader import ImageDataset, ImageItem, collate_images, next_usable
from .prompts import Ask, draw_ask, draw_grid, draw_prompts, shuffled
from .skipped import BadInput
from .sources import BadImage, Instance, Source
from .transforms import Size, ViewTransform

LEAST_PIXELS = 4
"""Fewest pixels of an object on the canvas. Smaller objects, for instance after a crop, are not prompted."""


class ObjectItem(NamedTuple):
    """One view of an image with n prompted objects.

    Attributes:
        key: Key of the image.
        canvas: RGB canvas, uint8, of shape (3, s, s).
        size: Height and width of the part of the canvas that is not padding.
        original_size: Height and width of the upright image file.
        seed: Seed that reproduces the augmentation.
        masks: Ground-truth masks (n, s, s) on the canvas.
        labelled: Whether the mask is the ground truth, (n,). False for a grid point of ``everything`` that is on no
            object; its mask is empty.
        valid: Whether the slot has a prompt, (n,). Always True, because objects are repeated if there are fewer than
            slots.
        ask: Types and numbers of prompts, equal for all objects.
        draws: For each candidate, prompts with b = 1 for the same masks.
        bad: Inputs that were unusable when this item was read.
    """

    key: str
    canvas: UInt8[Tensor, "3 s s"]
    size: Size
    original_size: Size
    seed: int
    masks: Bool[Tensor, "n s s"]
    labelled: Bool[Tensor, " n"]
    valid: Bool[Tensor, " n"]
    ask: Ask
    draws: tuple[Prompts, ...]
    bad: tuple[BadInput, ...] = ()


class ObjectDataset(Dataset[ObjectItem]):
    """View number ``view`` of each key with ``prompts.objects`` prompted objects.

    Image, objects and prompts depend on ``seed``, the key and ``view`` only. An image is skipped if it or a mask cannot
    be read, if a mask has another size than its image, or if the view shows no object. The next usable key then takes
    its place, so training continues. Crowds are not prompted.
    """

    def __init__(
        self, source: Source, transform: ViewTransform, prompts: PromptsConfig, keys: Sequence[str], seed: int = 0,
        view: int = 0,
    ) -> None:  # fmt: skip
        """Set up the data set without reading an image.

        Args:
            source: Images with masks; without masks only the mode ``everything`` is possible.
            transform: Augmentation and geometry.
            prompts: Settings of the prompts.
            keys: Keys of the items, in order.
            seed: Seed of the run.
            view: Number of the view.

        Raises:
            UserError: The prompts are derived from masks and the data set has none.
        """
        if not source.labelled and prompts.mode != "everything":
            raise UserError(f"prompts.mode: {prompts.mode} needs masks, which this data set lacks; use everything")
        self.source, self.prompts = source, prompts
        self.images = ImageDataset(source, transform, keys, seed, view)

    @property
    def identity(self) -> Sequence[str]:
        """Strings that distinguish these items from those of other data."""
        return self.images.keys

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ObjectItem:
        """Read item ``index``.

        Raises:
            UserError: 64 images in a row are unusable.
        """
        return next_usable(self._item, index, len(self), len(self), verb="trained on")

    def _item(self, index: int, bad: list[BadInput]) -> ObjectItem:
        image = self.images.item(index)
        objects, ask = self._objects(image, bad), draw_ask(self.prompts, image.seed)
        if self.prompts.mode == "everything":
            found = list(self._placed(image, objects))
            owners, draws = draw_grid(found, image.size, self.prompts, image.seed)
            nothing = torch.zeros(image.image.shape[-2:], dtype=torch.bool)
            masks = torch.stack([found[owner] if owner >= 0 else nothing for owner in owners])
            labelled = torch.tensor(owners) >= 0
        else:
            masks = self._drawn(image, objects)
            labelled = torch.ones(len(masks), dtype=torch.bool)
            draws = tuple(
                draw_prompts(masks, image.size, ask, self.prompts, image.seed, draw)
                for draw in range(self.prompts.candidates)
            )
        return ObjectItem(
            image.key, image.image, image.size, image.original_size, image.seed, masks, labelled,
            torch.ones_like(labelled), ask, draws, tuple(bad),
        )  # fmt: skip

    def _objects(self, image: ImageItem, bad: list[BadInput]) -> list[Instance]:
        """Return annotated objects that have a pixel. Add those without pixels to ``bad``.

        Raises:
            BadImage: The annotation cannot be read.
        """
        found = []
        for instance in self.source.instances(image.key):
            if instance.crowd:
                continue
            if instance.mask.any():
                found.append(instance)
            else:
                bad.append(BadInput(f"{image.key}, object {instance.id}", "its mask is empty"))
        return found

    def _placed(self, image: ImageItem, objects: Iterable[Instance]) -> Iterator[Bool[Tensor, "s s"]]:
        """Yield the masks that are visible in this view."""
        for instance in objects:
            mask = self.images.transform.masks(instance.mask, image.original_size, image.seed)
            if np.count_nonzero(mask.numpy()) >= LEAST_PIXELS:
                yield mask

    def _drawn(self, image: ImageItem, objects: Sequence[Instance]) -> Bool[Tensor, "n s s"]:
        """Draw masks without replacement. If there are fewer than slots, they are repeated."""
        slots, found = self.prompts.objects, []
        order = shuffled(len(objects), random.Random(f"objects/{image.seed}"))
        for mask in self._placed(image, (objects[i] for i in order)):  # lazily, so only as many as needed
            found.append(mask)
            if len(found) == slots:
                break
        if not found:
            shown = f"; none of {len(objects)} shows {LEAST_PIXELS} pixels in this view" if objects else ""
            raise BadImage(image.key, f"has no object to prompt{shown}")
        return torch.stack([found[slot % len(found)] for slot in range(slots)])


@dataclass(frozen=True)
class ObjectBatch:
    """b images with n prompted objects each.

    Attributes:
        images: The images.
        masks: Ground-truth masks (b, n, s, s) on the canvas.
        labelled: As in ``ObjectItem``, (b, n).
        valid: As in ``ObjectItem``, (b, n).
        draws: For each candidate, the prompts of all images in groups. Every image is in one group of each draw. The
            groups of all draws have the same rows.
        teacher_features: A teacher's cached features, by teacher and feature.
        bad: Inputs that were unusable.
    """

    images: ImageBatch
    masks: Bool[Tensor, "b n s s"]
    labelled: Bool[Tensor, "b n"]
    valid: Bool[Tensor, "b n"]
    draws: tuple[tuple[PromptGroup, ...], ...]
    bad: tuple[BadInput, ...] = ()
    teacher_features: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[PromptGroup, ...]:
        """The first draw. It does not depend on the number of candidates."""
        return self.draws[0]

    def to(self, device: torch.device | str) -> ObjectBatch:
        """Return a copy with every tensor on ``device``."""
        masks, labelled, valid = (t.to(device, non_blocking=True) for t in (self.masks, self.labelled, self.valid))
        draws = tuple(tuple(group.to(device) for group in groups) for groups in self.draws)
        teacher_features = {
            teacher: {name: values.to(device, non_blocking=True) for name, values in features.items()}
            for teacher, features in self.teacher_features.items()
        }
        return ObjectBatch(self.images.to(device), masks, labelled, valid, draws, self.bad, teacher_features)


def collate_objects(items: Sequence[ObjectItem]) -> ObjectBatch:
    """Collate items into one batch.

    Images with equal types and numbers of prompts form a group, so prompts need no padding. Groups are in the order of
    their first image. ``multimask`` is set only for groups with a single positive point.
    """
    images, _ = collate_images([ImageItem(i.canvas, i.size, i.original_size, i.key, i.seed) for i in items])
    assert images is not None
    rows: dict[Ask, list[int]] = {}
    for row, item in enumerate(items):
        rows.setdefault(item.ask, []).append(row)
    draws = tuple(
        tuple(
            PromptGroup(torch.tensor(alike), _joined([items[row].draws[draw] for row in alike]), ask.ambiguous)
            for ask, alike in rows.items()
        )
        for draw in range(len(items[0].draws))
    )
    masks, labelled, valid = (torch.stack([getattr(i, name) for i in items]) for name in ("masks", "labelled", "valid"))
    return ObjectBatch(images, masks, labelled, valid, draws, tuple(bad for item in items for bad in item.bad))


def _joined(prompts: Sequence[Prompts]) -> Prompts:
    """Concatenate prompts that have the same fields."""
    columns = ([getattr(one, f.name) for one in prompts] for f in fields(Prompts))
    return Prompts(*(None if column[0] is None else torch.cat(column) for column in columns))
