"""Prompted objects of images: what the prompt job trains on, image by image and in batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from ..config import PromptsConfig
from ..types import ImageBatch, PromptGroup, Prompts, UserError
from .loader import ImageDataset, ImageItem, collate_images
from .prompts import Ask, draw_ask, draw_grid, draw_prompts, shuffled
from .skipped import BadInput
from .sources import BadImage, Instance, Source
from .transforms import Size, ViewTransform

LEAST_PIXELS = 4
"""An object of which the canvas shows fewer pixels is none: after a crop or a resize nothing can point at it."""
_TRIES = 64


class ObjectItem(NamedTuple):
    """One view of an image and its n prompted objects.

    canvas, size, original_size, key, seed: as in ``ImageItem``. masks: on the canvas. labelled: whether the mask is the
    answer; False where a point of ``everything`` lies on no object, whose mask is then empty. valid: whether the slot
    asks anything; objects come again where there are fewer than slots, so all do. ask: what the prompts have in common.
    draws: the candidates' prompts with b = 1, all about the same masks. bad: what was unusable on the way to this item.
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
    """View number ``view`` of each key with ``prompts.objects`` prompted objects, and what was unusable on the way.

    Image, objects and prompts depend on ``seed``, the key and ``view`` alone. Training never dies of one bad image:
    where an image or a mask cannot be read, a mask has another size than its image, or the view shows no object, the
    next usable key takes its place. Crowds are no objects.
    """

    def __init__(
        self, source: Source, transform: ViewTransform, prompts: PromptsConfig, keys: Sequence[str], seed: int = 0,
        view: int = 0,
    ) -> None:  # fmt: skip
        """Raises ``UserError`` where prompts are to be drawn from masks and the data set has none."""
        if not source.labelled and prompts.mode != "everything":
            raise UserError(f"prompts.mode: {prompts.mode} needs masks, which this data set lacks; everything does not")
        self.source, self.prompts = source, prompts
        self.images = ImageDataset(source, transform, keys, seed, view)

    @property
    def identity(self) -> Sequence[str]:
        """What tells the items from those of other data."""
        return self.images.keys

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ObjectItem:
        """Raises ``UserError`` after 64 unusable images in a row."""
        if not 0 <= index < len(self):
            raise IndexError(index)  # what ends a plain ``for``
        bad: list[BadInput] = []
        for step in range(min(_TRIES, len(self))):
            image = self.images[(index + step) % len(self)]
            if isinstance(image, ImageItem):
                try:
                    return self._item(image, bad)
                except BadImage as error:
                    image = error.bad
            bad.append(image)
        raise UserError(f"{len(bad)} images in a row cannot be trained on, first {bad[0].key}: {bad[0].reason}")

    def _item(self, image: ImageItem, bad: list[BadInput]) -> ObjectItem:
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
        """The annotated objects that have a pixel; the others are named. Raises ``BadImage`` as the source does."""
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
        """The masks that this view shows, one at a time."""
        for instance in objects:
            mask = self.images.transform.masks(instance.mask, image.original_size, image.seed)
            if np.count_nonzero(mask.numpy()) >= LEAST_PIXELS:
                yield mask

    def _drawn(self, image: ImageItem, objects: Sequence[Instance]) -> Bool[Tensor, "n s s"]:
        """The masks that are asked for: a draw without replacement, over and over if there are fewer than slots."""
        slots, found = self.prompts.objects, []
        order = shuffled(len(objects), random.Random(f"objects/{image.seed}"))
        for mask in self._placed(image, (objects[i] for i in order)):  # no more of them than needed
            found.append(mask)
            if len(found) == slots:
                break
        if not found:
            shown = f"; none of {len(objects)} shows {LEAST_PIXELS} pixels in this view" if objects else ""
            raise BadImage(image.key, f"no object to ask for{shown}")
        return torch.stack([found[slot % len(found)] for slot in range(slots)])


@dataclass(frozen=True)
class ObjectBatch:
    """b images and n prompted objects of each.

    draws: for each candidate the prompts of all images, grouped; every image is in one group of each draw, and the
    groups of all draws hold the same rows. The other fields are those of the items.
    """

    images: ImageBatch
    masks: Bool[Tensor, "b n s s"]
    labelled: Bool[Tensor, "b n"]
    valid: Bool[Tensor, "b n"]
    draws: tuple[tuple[PromptGroup, ...], ...]
    bad: tuple[BadInput, ...] = ()

    @property
    def groups(self) -> tuple[PromptGroup, ...]:
        """The first draw, which is the same for any number of candidates."""
        return self.draws[0]

    def to(self, device: torch.device | str) -> ObjectBatch:
        """A copy with every tensor on ``device``."""
        masks, labelled, valid = (t.to(device, non_blocking=True) for t in (self.masks, self.labelled, self.valid))
        draws = tuple(tuple(group.to(device) for group in groups) for groups in self.draws)
        return ObjectBatch(self.images.to(device), masks, labelled, valid, draws, self.bad)


def collate_objects(items: Sequence[ObjectItem]) -> ObjectBatch:
    """One batch. A group is the images that are asked alike, so that no prompt is padded, in the order of its first.

    A group of single points, and no other, asks for three masks.
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
    """Prompts that hold the same fields, image after image."""
    columns = ([getattr(one, f.name) for one in prompts] for f in fields(Prompts))
    return Prompts(*(None if column[0] is None else torch.cat(column) for column in columns))
