"""The signals of promptable teachers from feature stores: how they are cut into records, and put together again."""

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
"""The cached feature that each distillation term is computed from."""
DENSE = "low_res_masks"
MASK_TOKENS, MOST_MASKS = 4, 3
"""Mask tokens of a SAM's decoder, and masks it gives to one prompt at most."""

Shape = tuple[int, int, int]


def record_shapes(
    patch_channels: int, width: int, grid: tuple[int, int], objects: int, dense: bool
) -> dict[str, Shape]:  # fmt: skip
    """Feature to the shape of one image's record, as ``to_records`` makes them.

    patch_channels: of the projected patch features. width, grid: of the teacher's image embedding.
    """
    height, width_in_cells = grid
    shapes = {
        "encoder_patch": (patch_channels, height, width_in_cells),
        "prompt_embed": (width, height, width_in_cells),
        "mask_token": (objects, MASK_TOKENS, width),
    }
    return shapes | ({DENSE: (MOST_MASKS * objects, 4 * height, 4 * width_in_cells)} if dense else {})


def record_seeds(batch: ObjectBatch) -> Int[Tensor, " b"]:
    """What stands in the place of the augmentation seed in the records of each image: 32 bits over that seed and over
    the first prompts about the image.

    Prompts are drawn from masks. A record whose masks have changed since answers another question, and shows by this.
    Coordinates count to an eighth of a pixel, so that rounding on another machine does not.
    """
    found, seeds = torch.zeros(len(batch.images), dtype=torch.int64), batch.images.seeds.tolist()
    for group in batch.groups:
        prompts = group.prompts
        columns = [_eighths(value, len(group.rows)) for value in (prompts.points, prompts.labels, prompts.boxes)]
        for row, *about in zip(group.rows.tolist(), *columns, strict=True):
            found[row] = zlib.crc32(repr([seeds[row], group.multimask, *about]).encode()) & 0x7FFF_FFFF
    return found


def _eighths(value: Tensor | None, rows: int) -> list[Any]:
    """In whole eighths, row by row; brought to the CPU in one copy, since every step asks."""
    return [None] * rows if value is None else (value.cpu().double() * 8).round().int().tolist()


def to_records(signals: PromptSignals, groups: Sequence[PromptGroup]) -> Records:
    """A batch's signals by image, in the order of the batch.

    ``encoder_patch`` (c, gh, gw) as it is; ``prompt_embed`` (c, gh, gw), the same for every object of a first prompt;
    ``mask_token`` (n, t, c); ``low_res_masks`` (3 n, h, w), object after object: the three masks of an ambiguous
    prompt, or one and two of zeros. Raises ``ValueError`` for prompts that hold masks, whose embedding differs between
    objects.
    """
    if any(group.prompts.masks is not None for group in groups):
        raise ValueError("only the answers to first prompts are kept")
    said = list(zip(groups, signals.groups, strict=True))
    records = {
        "encoder_patch": signals.encoder_patch,
        "prompt_embed": _by_image([(group, one.prompt_embed[:, 0]) for group, one in said]),
        "mask_token": _by_image([(group, one.mask_tokens) for group, one in said]),
    }
    masks = [(group, one.low_res_masks) for group, one in said if one.low_res_masks is not None]
    return records | ({DENSE: _by_image([(group, _padded(values)) for group, values in masks])} if masks else {})


def _padded(masks: Float[Tensor, "g n m h w"]) -> Float[Tensor, "g 3n h w"]:
    g, n, m, h, w = masks.shape
    full = masks.new_zeros(g, n, MOST_MASKS, h, w)
    full[:, :, :m] = masks
    return full.flatten(1, 2)


def _by_image(parts: Sequence[tuple[PromptGroup, Tensor]]) -> Tensor:
    """The groups' values in the order of the batch."""
    rows, values = torch.cat([group.rows for group, _ in parts]), torch.cat([value for _, value in parts])
    return values[rows.argsort().to(values.device)]


def from_records(records: Records, groups: Sequence[PromptGroup]) -> PromptSignals:
    """What ``to_records`` was given. A feature that is not among ``records`` is a tensor without elements."""

    def of(name: str, group: PromptGroup) -> Tensor:
        values = records.get(name)
        return torch.empty(len(group.rows), 0, 0, 0) if values is None else values[group.rows.to(values.device)]

    said = []
    for group in groups:
        objects, masks = group.prompts.valid.shape[1], None
        if DENSE in records:
            masks = of(DENSE, group).unflatten(1, (objects, MOST_MASKS))[:, :, : MOST_MASKS if group.multimask else 1]
        said.append(GroupSignals(of("prompt_embed", group)[:, None], of("mask_token", group), masks))
    count = sum(len(group.rows) for group in groups)
    return PromptSignals(records.get("encoder_patch", torch.empty(count, 0, 0, 0)), tuple(said))


@dataclass(frozen=True)
class StoredTeacher:
    """What is known of a teacher whose signals are read: see ``promptable.Described``."""

    name: str
    grid: tuple[int, int]
    width: int


def _described(name: str, prompt_embed: Shape) -> StoredTeacher:
    width, *grid = prompt_embed
    return StoredTeacher(name, (grid[0], grid[1]), width)


class StoredSignals:
    """``Signals`` of promptable teachers from stores: no teacher is in memory.

    stores: by teacher, then by feature; ``prompt_embed``, which tells width and grid, is always among them. weights: of
    each teacher, summing to one. terms: distillation terms that are on; the features of others are not read. seed,
    views: of the data, which tell the view of an image in a batch.
    Raises ``UserError`` for a term whose feature is in no store.
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
        """Channels of each teacher's ``encoder_patch``; empty where that term is off."""
        found = {teacher: stores.get("encoder_patch") for teacher, stores in self.stores.items()}
        return {teacher: store.spec.shape[0] for teacher, store in found.items() if store is not None}

    def meets(self, grid: tuple[int, int], width: int, terms: Sequence[str]) -> None:
        """``promptable.check_match`` for every teacher."""
        for teacher in self.teachers:
            check_match(grid, width, terms, teacher)

    def read(self, asked: Prompted) -> dict[str, Records]:
        """The records of each teacher, on the CPU.

        Raises ``UserError`` that names an image without a record, or one of which another view or other prompts were
        cached.
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
        """What each teacher said to ``groups``, the batch's own, on the device of the records."""
        return {teacher: from_records(records, asked.groups) for teacher, records in read.items()}

    def to(self, device: torch.device | str) -> None:
        """Nothing to move: records come with the batch."""


def _refuse_other_prompts(store: FeatureStore, names: Sequence[str], same: Sequence[bool]) -> None:
    strange = [name for name, alike in zip(names, same, strict=True) if not alike]
    if strange:
        raise UserError(
            f"{store.root}: {len(strange)} records show another view or answer other prompts than the batch has, such "
            f"as {strange[0]!r}: have its masks changed? Set data.seed as it was, or delete this cache and cache again"
        )
