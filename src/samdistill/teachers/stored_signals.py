"""Signals of promptable teachers from feature stores: conversion to records and back."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data import ObjectBatch
from ..store import FeatureStore
from ..types import GroupSignals, PromptGroup, PromptSignals, UserError
from .base import Prompted, Records
from .promptable import check_match
from .stored import view_name

FEATURE_OF = {
    "encoder_patch": "encoder_patch", "prompt_embed": "prompt_embed", "decoder_mask_token": "mask_token",
    "dense_mask_logits": "low_res_masks",
}  # fmt: skip
"""Cached feature of each distillation term."""
DENSE = "low_res_masks"
MASK_TOKENS, MOST_MASKS = 4, 3
"""Number of mask tokens of SAM's decoder, and largest number of masks for one prompt."""

Shape = tuple[int, int, int]


def record_shapes(
    patch_channels: int, width: int, grid: tuple[int, int], objects: int, dense: bool
) -> dict[str, Shape]:  # fmt: skip
    """Return the shape of one image's record of each feature, see ``to_records``.

    Args:
        patch_channels: Channels of the projected patch features.
        width: Channels of the teacher's image embedding.
        grid: Rows and columns of the teacher's image embedding.
        objects: Number n of prompted objects per image.
        dense: Include mask logits.
    """
    height, width_in_cells = grid
    shapes = {
        "encoder_patch": (patch_channels, height, width_in_cells),
        "prompt_embed": (width, height, width_in_cells),
        "mask_token": (objects, MASK_TOKENS, width),
    }
    return shapes | ({DENSE: (MOST_MASKS * objects, 4 * height, 4 * width_in_cells)} if dense else {})


def record_seeds(batch: ObjectBatch) -> Int[Tensor, " b"]:
    """Return the number that the record of each image has in place of its augmentation seed.

    It is a 31-bit checksum of the augmentation seed and of the first prompts of the image. Prompts are drawn from
    masks, so a record whose masks have changed is recognised. Coordinates are rounded to an eighth of a pixel, so that
    rounding differences between machines do not matter.
    """
    found, seeds = torch.zeros(len(batch.images), dtype=torch.int64), batch.images.seeds.tolist()
    for group in batch.groups:
        prompts = group.prompts
        columns = [_eighths(value, len(group.rows)) for value in (prompts.points, prompts.labels, prompts.boxes)]
        for row, *about in zip(group.rows.tolist(), *columns, strict=True):
            found[row] = zlib.crc32(repr([seeds[row], group.multimask, *about]).encode()) & 0x7FFF_FFFF
    return found


def _eighths(value: Tensor | None, rows: int) -> list[Any]:
    """Return rows as whole eighths, with one copy to the CPU, because this runs in every step."""
    return [None] * rows if value is None else (value.cpu().double() * 8).round().int().tolist()


def to_records(signals: PromptSignals, groups: Sequence[PromptGroup]) -> Records:
    """Return the features of a batch by name, one row per image in the order of the batch.

    ``encoder_patch`` is (c, gh, gw). ``prompt_embed`` is (c, gh, gw), as all objects of a first prompt share it.
    ``mask_token`` is (n, t, c). ``low_res_masks`` is (3 n, h, w), grouped by object: the three masks of an ambiguous
    prompt, or one mask and two of zeros.

    Raises:
        ValueError: A prompt contains masks; its embedding would differ between objects.
    """
    if any(group.prompts.masks is not None for group in groups):
        raise ValueError("only the answers to first prompts are kept")
    answers = list(zip(groups, signals.groups, strict=True))
    records = {
        "encoder_patch": signals.encoder_patch,
        "prompt_embed": _by_image([(group, one.prompt_embed[:, 0]) for group, one in answers]),
        "mask_token": _by_image([(group, one.mask_tokens) for group, one in answers]),
    }
    masks = [(group, one.low_res_masks) for group, one in answers if one.low_res_masks is not None]
    return records | ({DENSE: _by_image([(group, _padded(values)) for group, values in masks])} if masks else {})


def _padded(masks: Float[Tensor, "g n m h w"]) -> Float[Tensor, "g 3n h w"]:
    g, n, m, h, w = masks.shape
    full = masks.new_zeros(g, n, MOST_MASKS, h, w)
    full[:, :, :m] = masks
    return full.flatten(1, 2)


def _by_image(parts: Sequence[tuple[PromptGroup, Tensor]]) -> Tensor:
    """Concatenate the values of groups and sort them in the order of the batch."""
    rows, values = torch.cat([group.rows for group, _ in parts]), torch.cat([value for _, value in parts])
    return values[rows.argsort().to(values.device)]


def from_records(records: Records, groups: Sequence[PromptGroup]) -> PromptSignals:
    """Invert ``to_records``. A feature that is missing in ``records`` becomes a tensor without elements."""

    def of(name: str, group: PromptGroup) -> Tensor:
        values = records.get(name)
        return torch.empty(len(group.rows), 0, 0, 0) if values is None else values[group.rows.to(values.device)]

    found = []
    for group in groups:
        objects, masks = group.prompts.valid.shape[1], None
        if DENSE in records:
            masks = of(DENSE, group).unflatten(1, (objects, MOST_MASKS))[:, :, : MOST_MASKS if group.multimask else 1]
        found.append(GroupSignals(of("prompt_embed", group)[:, None], of("mask_token", group), masks))
    count = sum(len(group.rows) for group in groups)
    return PromptSignals(records.get("encoder_patch", torch.empty(count, 0, 0, 0)), tuple(found))


@dataclass(frozen=True)
class StoredTeacher:
    """Description of a cached teacher, see ``promptable.Described``."""

    name: str
    grid: tuple[int, int]
    width: int


def _described(name: str, prompt_embed: Shape) -> StoredTeacher:
    width, *grid = prompt_embed
    return StoredTeacher(name, (grid[0], grid[1]), width)


class StoredSignals:
    """``Signals`` of promptable teachers from feature stores. No teacher is in memory.

    Args:
        stores: Stores by teacher and feature. ``prompt_embed`` is always one, because width and grid are read from it.
        weights: Weights by teacher, which sum to 1.
        terms: Enabled distillation terms. Features of other terms are not read.
        seed: ``data.seed`` of the run.
        views: Number of cached views per image.

    Raises:
        UserError: A term needs a feature that is in no store.
    """

    def __init__(
        self, stores: Mapping[str, Mapping[str, FeatureStore]], weights: Mapping[str, float], terms: Sequence[str],
        seed: int, views: int,
    ) -> None:  # fmt: skip
        self.weights, self.seed, self.views = dict(weights), seed, views
        wanted = {FEATURE_OF[term]: term for term in terms}
        for teacher in self.weights:
            for feature, term in wanted.items():
                if feature not in stores.get(teacher, {}):
                    raise UserError(
                        f"distillation.{term} is on, but {feature} of teacher {teacher!r} is in no cache: run "
                        f"`samdistill cache` with this config, or set distillation.{term}.enable: false"
                    )
        self.stores = {teacher: {name: stores[teacher][name] for name in wanted} for teacher in self.weights}
        self.teachers = [_described(name, stores[name]["prompt_embed"].spec.shape) for name in self.weights]
        lines = [f"{name} {stores[name]['prompt_embed'].spec.teacher}\n" for name in sorted(self.weights)]
        self.fingerprint = hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def patch_channels(self) -> dict[str, int]:
        """Channels of ``encoder_patch`` by teacher; empty if that term is off."""
        found = {teacher: stores.get("encoder_patch") for teacher, stores in self.stores.items()}
        return {teacher: store.spec.shape[0] for teacher, store in found.items() if store is not None}

    def meets(self, grid: tuple[int, int], width: int, terms: Sequence[str]) -> None:
        """Call ``promptable.check_match`` for every teacher."""
        for teacher in self.teachers:
            check_match(grid, width, terms, teacher)

    def read(self, asked: Prompted) -> dict[str, Records]:
        """Return the records of each teacher, on the CPU.

        Raises:
            UserError: An image has no record, or its record is of another view or of other prompts.
        """
        images = asked.batch.images
        seeds = zip(images.keys, images.seeds.tolist(), strict=True)
        names = [view_name(key, seed, self.seed, self.views) for key, seed in seeds]
        found, wanted = dict[str, Records](), record_seeds(asked.batch)
        for teacher, stores in self.stores.items():
            records = {}
            for feature, store in stores.items():
                made_with, records[feature] = store.read_batch(names)
                _refuse_other_prompts(store, names, (made_with == wanted).tolist())
            found[teacher] = records
        return found

    def answer(self, asked: Prompted, read: Mapping[str, Records]) -> dict[str, PromptSignals]:
        """Return the signals of each teacher for the batch's own groups, on the device of the records."""
        return {teacher: from_records(records, asked.groups) for teacher, records in read.items()}

    def to(self, device: torch.device | str) -> None:
        """Do nothing, because the records are in the batch."""


def _refuse_other_prompts(store: FeatureStore, names: Sequence[str], same: Sequence[bool]) -> None:
    strange = [name for name, alike in zip(names, same, strict=True) if not alike]
    if strange:
        raise UserError(
            f"{store.root}: {len(strange)} records show another view or answer other prompts than the batch has, such "
            f"as {strange[0]!r}: have its masks changed? Set data.seed as it was, or delete this cache and cache again"
        )
