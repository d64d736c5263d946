"""Clips of videos: a query frame with its masks and the annotated frames before it, item by item and in batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..config import AugmentConfig
from ..types import ImageBatch, UserError
from .loader import ImageItem, collate_images
from .objects import LEAST_PIXELS
from .skipped import BadInput
from .sources import BadImage
from .transforms import PAD, Size, ViewTransform
from .videos import BadVideo, VideoRecord, VideoSource

_TRIES = 64


@dataclass(frozen=True)
class ClipRules:
    """How clips are cut.

    context: annotated frames before the query, next to it, T at most. shortest: the fewest that a clip of a long enough
    video may have, None for ``context``; with 1 the first frames of a video are asked about too, as in a stream.
    objects: the most in a clip. per_video: clips of each video in an epoch. images: decode the context frames
    too. cached: features of the context will be read from a cache, where no frame is augmented.

    marks: side of the grid on which it is said where each object was in the context; 0 leaves it out. With marks the
    objects of a clip are those that the context shows, whether or not the query does; without, those in the query.
    lost: share of an object's marks that are left out, never all. own: share of the context frames that are marked as
    remembered by the student's own features.
    """

    context: int = 8
    shortest: int | None = None
    objects: int = 20
    per_video: int = 1
    images: bool = False
    cached: bool = True
    marks: int = 0
    lost: float = 0.0
    own: float = 0.0

    def __post_init__(self) -> None:
        if min(self.context, self.objects, self.per_video) < 1:
            raise UserError("a clip needs one context frame, one object and one clip per video at least")
        if self.shortest is not None and not 1 <= self.shortest <= self.context:
            raise UserError(f"the shortest context is 1 to {self.context} frames, not {self.shortest}")
        if self.own and not self.images:
            raise ValueError("own features are of decoded frames: images=True")


@dataclass(frozen=True)
class ClipItem:
    """One query frame, its n objects and the t annotated frames before it, oldest first; 1 <= t <= T.

    canvas, size, original_size, seed: of the query as in ``ImageItem``; ``seed`` replays the view of every frame.
    masks: on the canvas, empty for an object that it does not show; n may be 0. objects: their ids. concepts: what each
    is called, or (). query_frame, context_frames: numbers of the video's frames. query_row, context_rows: their places
    among the annotated frames. context_times: seconds after the query, all negative. own: whether a context frame is
    remembered by the student's own features. context: canvases where they were asked for. marks: the share of each cell
    of a context frame that an object covers, where asked for; 0 where its mark was lost. bad: what was unusable on the
    way to this item.
    """

    key: str
    canvas: UInt8[Tensor, "3 s s"]
    size: Size
    original_size: Size
    seed: int
    query_frame: int
    query_row: int
    masks: Bool[Tensor, "n s s"]
    objects: Int[Tensor, " n"]
    concepts: tuple[tuple[str, ...], ...]
    context_frames: Int[Tensor, " t"]
    context_rows: Int[Tensor, " t"]
    context_times: Float[Tensor, " t"]
    own: Bool[Tensor, " t"]
    context: UInt8[Tensor, "t 3 s s"] | None = None
    marks: Float[Tensor, "n t g g"] | None = None
    bad: tuple[BadInput, ...] = ()


def draw_clip(record: VideoRecord, rules: ClipRules, rng: np.random.Generator) -> tuple[int, range]:
    """Row of the query and rows of its context.

    The query is any row with ``rules.shortest`` before it; in a video too short for that it is the last row, and the
    context is what there is. Raises ``BadVideo`` for fewer than two annotated frames.
    """
    last = len(record.annotated) - 1
    if last < 1:
        raise BadVideo(record.key, f"{last + 1} annotated frame; a clip needs a query and one before it")
    shortest = rules.context if rules.shortest is None else rules.shortest
    query = int(rng.integers(min(shortest, last), last + 1))
    return query, range(max(0, query - rules.context), query)


def read_clip(
    source: VideoSource, record: VideoRecord, query: int, context: Sequence[int], transform: ViewTransform,
    rules: ClipRules, rng: np.random.Generator,
) -> ClipItem:  # fmt: skip
    """The clip of rows ``query`` and ``context``. All its frames are laid alike, by one seed from ``rng``.

    An object of which the query's canvas shows some pixels, but fewer than ``LEAST_PIXELS``, is left out; of more than
    ``rules.objects`` ``rng`` draws. Raises ``BadVideo`` where a frame or a mask cannot be read.
    """
    seed = int(rng.integers(2**31))
    rows = [*context, query] if rules.images else [query]
    frames = source.frames(record.key, [record.annotated[row] for row in rows])
    views = [transform(Image.fromarray(pixels), seed) for pixels in frames]
    canvas, size = views[-1]

    def placed(row: int) -> Bool[Tensor, "m s s"]:
        return transform.masks(source.masks(record.key, record.annotated[row]), record.size, seed)

    masks, marks = placed(query), None
    if rules.marks:
        past = torch.stack([placed(row) for row in context], 1)
        columns = _drawn(_asked(record, query, masks, past), rules, rng)
        marks = _marks(past[columns], rules, rng)
    else:
        columns = _drawn(masks.flatten(1).sum(1) >= LEAST_PIXELS, rules, rng)
    numbers = torch.tensor([record.annotated[row] for row in context], dtype=torch.int64)
    query_frame = record.annotated[query]
    return ClipItem(
        record.key, canvas, size, record.size, seed, query_frame, query, masks[columns],
        torch.tensor([record.objects[k] for k in columns], dtype=torch.int64),
        tuple(record.concepts[k] for k in columns if record.concepts), numbers,
        torch.tensor(list(context), dtype=torch.int64), (numbers - query_frame) / record.rate,
        torch.from_numpy(rng.random(len(context)) < rules.own),
        torch.stack([view for view, _ in views[:-1]]) if rules.images else None, marks,
    )  # fmt: skip


def _drawn(fit: Bool[Tensor, " m"], rules: ClipRules, rng: np.random.Generator) -> list[int]:
    """Columns of the objects that are asked about, ascending."""
    return sorted(rng.permutation(np.flatnonzero(fit.numpy()))[: rules.objects].tolist())


def _asked(
    record: VideoRecord, query: int, masks: Bool[Tensor, "m s s"], past: Bool[Tensor, "m t s s"]
) -> Bool[Tensor, " m"]:
    """Objects that can be asked about by where they were: the past shows them, and it is known whether the query does.

    One that is not labelled in the query may be there or not; of one that shows a few pixels nothing can be learnt.
    """
    pixels = masks.flatten(1).sum(1)
    known = torch.from_numpy(record.labelled[query]) & ((pixels == 0) | (pixels >= LEAST_PIXELS))
    return known & (past.flatten(2).sum(-1) >= LEAST_PIXELS).any(1)


def _marks(past: Bool[Tensor, "n t s s"], rules: ClipRules, rng: np.random.Generator) -> Float[Tensor, "n t g g"]:
    """Shares of cells, without the lost ones; where an object would lose all, it keeps the latest."""
    seen = past.flatten(2).any(-1)
    kept = seen & torch.from_numpy(rng.random(seen.shape) >= rules.lost)
    for row in np.flatnonzero(~kept.any(1).numpy()):
        kept[row, seen[row].nonzero()[-1]] = True
    return F.adaptive_avg_pool2d((past & kept[..., None, None]).float(), rules.marks)


class ClipDataset(Dataset[ClipItem]):
    """``rules.per_video`` clips of each video, and what was unusable on the way.

    A clip depends on ``seed``, ``epoch`` and its index alone. Training never dies of one bad video, and never shows
    another picture than the one that the masks belong to: where a video is broken, does not fit its annotation or has
    fewer than two annotated frames, the clip of the next index takes its place. Objects that appear nowhere are named.
    """

    def __init__(
        self, source: VideoSource, transform: ViewTransform, keys: Sequence[str], rules: ClipRules, seed: int = 0,
        epoch: int = 0,
    ) -> None:  # fmt: skip
        """Raises ``UserError`` for augmented frames beside a cache, whose features know nothing of them."""
        if rules.cached and transform.augment != AugmentConfig():
            raise UserError("data.augment: cached features are of frames as they are; turn the augmentations off")
        self.source, self.transform, self.keys, self.rules = source, transform, list(keys), rules
        self.seed, self.epoch = seed, epoch

    @property
    def identity(self) -> Sequence[str]:
        """What tells the clips from those of other data."""
        return self.keys

    def __len__(self) -> int:
        return len(self.keys) * self.rules.per_video

    def __getitem__(self, index: int) -> ClipItem:
        """Clip ``index // len(keys)`` of video ``index % len(keys)``.

        Raises ``UserError`` after 64 unusable videos in a row, or where all are.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)  # what ends a plain ``for``
        bad: list[BadInput] = []
        for step in range(min(_TRIES, len(self.keys))):
            number = (index + step) % len(self)
            key = self.keys[number % len(self.keys)]
            try:
                return self._clip(key, np.random.default_rng([self.seed, self.epoch, number]), bad)
            except BadImage as error:
                bad.append(error.bad)
        raise UserError(f"{len(bad)} videos in a row cannot be trained on, first {bad[0].key}: {bad[0].reason}")

    def _clip(self, key: str, rng: np.random.Generator, bad: list[BadInput]) -> ClipItem:
        record = self.source.record(key)
        query, context = draw_clip(record, self.rules, rng)
        item = read_clip(self.source, record, query, context, self.transform, self.rules, rng)
        return replace(item, bad=(*bad, *record.problems))


@dataclass(frozen=True)
class ClipBatch:
    """b clips: query frames as images, n slots for objects and t for context frames, as many as the fullest clip has.

    valid, context_valid: False for slots that only fill the batch. There masks are empty, objects, frames and rows -1,
    times 0, own False, marks 0, and the context is grey, which is no frame of anything. The other fields are those of
    the items.
    """

    images: ImageBatch
    query_frames: Int[Tensor, " b"]
    query_rows: Int[Tensor, " b"]
    masks: Bool[Tensor, "b n s s"]
    objects: Int[Tensor, "b n"]
    valid: Bool[Tensor, "b n"]
    concepts: tuple[tuple[tuple[str, ...], ...], ...]
    context_frames: Int[Tensor, "b t"]
    context_rows: Int[Tensor, "b t"]
    context_times: Float[Tensor, "b t"]
    context_valid: Bool[Tensor, "b t"]
    own: Bool[Tensor, "b t"]
    context: UInt8[Tensor, "b t 3 s s"] | None = None
    marks: Float[Tensor, "b n t g g"] | None = None
    bad: tuple[BadInput, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> ClipBatch:
        """A copy with every tensor on ``device``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: v.to(device, non_blocking=True) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, images=self.images.to(device), **moved)


def collate_clips(items: Sequence[ClipItem]) -> ClipBatch:
    """One batch, filled up to its longest context and its most objects."""
    images, _ = collate_images([ImageItem(i.canvas, i.size, i.original_size, i.key, i.seed) for i in items])
    assert images is not None
    contexts = [item.context for item in items if item.context is not None]
    longest = max(len(item.context_rows) for item in items)
    marks = [F.pad(i.marks, (0, 0, 0, 0, 0, longest - i.marks.shape[1])) for i in items if i.marks is not None]
    return ClipBatch(
        images,
        torch.tensor([item.query_frame for item in items]),
        torch.tensor([item.query_row for item in items]),
        _filled((item.masks for item in items), False),
        _filled((item.objects for item in items), -1),
        _filled((torch.ones_like(item.objects, dtype=torch.bool) for item in items), False),
        tuple(item.concepts for item in items),
        _filled((item.context_frames for item in items), -1),
        _filled((item.context_rows for item in items), -1),
        _filled((item.context_times for item in items), 0.0),
        _filled((torch.ones_like(item.context_rows, dtype=torch.bool) for item in items), False),
        _filled((item.own for item in items), False),
        _filled(contexts, PAD) if contexts else None,
        _filled(marks, 0.0) if marks else None,
        tuple(bad for item in items for bad in item.bad),
    )


def _filled(parts: Iterable[Tensor], value: float) -> Tensor:
    """Stacked, with ``value`` behind the end of those that are shorter than the longest."""
    rows = list(parts)
    filled = rows[0].new_full((len(rows), max(len(row) for row in rows), *rows[0].shape[1:]), value)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row)] = row
    return filled
