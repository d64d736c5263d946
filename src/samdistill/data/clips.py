"""Clips of videos: a query frame with masks and the annotated frames before it, as items and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from .loader import ImageItem, collate_images, next_usable
from .objects import LEAST_PIXELS
from .skipped import BadInput
from .transforms import PAD, Size, ViewTransform
from .videos import BadVideo, VideoRecord, VideoSource


@dataclass(frozen=True)
class ClipRules:
    """Rules by which clips are cut from videos.

    Attributes:
        context: Largest number T of context frames, which are the annotated frames directly before the query frame.
        shortest: Smallest number of context frames if the video is long enough; None for ``context``. With 1, the first
            frames of a video can be query frames, as in streaming.
        objects: Largest number of objects in a clip.
        per_video: Clips per video and epoch.
        images: Decode the context frames too.
        cached: The memory gets features of a teacher, running or cached, so frames must not be augmented.
        marks: Side g of a grid on which the positions of objects in the context frames are given; 0 for none. With
            marks, the objects of a clip are those visible in the context, whether or not the query frame shows them.
            Without marks they are those visible in the query frame.
        lost: Probability that the marks of an object in a context frame are removed. At least one frame is kept.
        own: Probability that a context frame enters the memory with the student's features instead of the teacher's.

    Raises:
        UserError: A number is too small, or ``shortest`` is not in 1..``context``.
        ValueError: ``own`` without ``images``.
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
            raise UserError("`context`, `objects` and `per_video` of a clip must be at least 1")
        if self.shortest is not None and not 1 <= self.shortest <= self.context:
            raise UserError(f"`shortest` must be 1 to {self.context} context frames, got {self.shortest}")
        if self.own and not self.images:
            raise ValueError("`own` needs decoded context frames: set images=True")


@dataclass(frozen=True)
class ClipItem:
    """One query frame with n objects and t context frames, oldest first; 1 <= t <= T.

    Attributes:
        key: Key of the video.
        canvas: RGB canvas of the query frame, uint8, of shape (3, s, s).
        size: Height and width of the part of the canvas that is not padding.
        original_size: Height and width of a frame.
        seed: Seed that reproduces the view of every frame.
        query_frame: Number of the query frame in the video.
        query_row: Number of the query frame among the annotated frames.
        masks: Masks (n, s, s) on the canvas; empty for an object that the query frame does not show. n may be 0.
        objects: Ids of the objects, (n,).
        concepts: Phrases for each object, or ().
        context_frames: Numbers of the context frames in the video, (t,).
        context_rows: Numbers of the context frames among the annotated frames, (t,).
        context_times: Times of the context frames relative to the query frame in seconds, negative, (t,).
        own: Whether a context frame enters the memory with the student's features, (t,).
        context: Canvases of the context frames, (t, 3, s, s), or None.
        marks: Fraction of each grid cell that an object covers in a context frame, (n, t, g, g), or None. 0 if the
            marks were removed.
        teacher_features: What ``read`` returned for the clip: cached features, or frames for a running teacher.
        bad: Inputs that were unusable when this item was read.
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
    teacher_features: tuple[Tensor, ...] = ()
    bad: tuple[BadInput, ...] = ()


def draw_clip(record: VideoRecord, rules: ClipRules, rng: np.random.Generator) -> tuple[int, range]:
    """Draw a query frame and its context.

    The query is any annotated frame with at least ``rules.shortest`` annotated frames before it. If the video has too
    few annotated frames, the query is the last one, and the context is all frames before it.

    Returns:
        Row of the query frame, and rows of the context frames.

    Raises:
        BadVideo: There are fewer than two annotated frames.
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
    """Read the frames and masks of a clip.

    All frames have the same view, with one seed drawn from ``rng``. An object with fewer than ``LEAST_PIXELS`` pixels
    on the canvas of the query frame is left out; with ``rules.marks``, an object without any pixel is kept. If there
    are more than ``rules.objects`` objects, ``rng`` selects among them.

    Args:
        source: The videos.
        record: Description of the video.
        query: Row of the query frame.
        context: Rows of the context frames, ascending.
        transform: Augmentation and geometry.
        rules: Rules of the clip.
        rng: Random stream of the clip.

    Raises:
        BadVideo: A frame or a mask cannot be read.
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
    """Select up to ``rules.objects`` of the objects in ``fit``, and return their columns, ascending."""
    return sorted(rng.permutation(np.flatnonzero(fit.numpy()))[: rules.objects].tolist())


def _asked(
    record: VideoRecord, query: int, masks: Bool[Tensor, "m s s"], past: Bool[Tensor, "m t s s"]
) -> Bool[Tensor, " m"]:
    """Return the objects that can be trained on with marks.

    A context frame shows them with at least ``LEAST_PIXELS`` pixels, and it is known whether the query frame shows
    them. An object that is not labelled in the query frame may or may not be visible. One with fewer than
    ``LEAST_PIXELS`` pixels is too small.
    """
    pixels = masks.flatten(1).sum(1)
    known = torch.from_numpy(record.labelled[query]) & ((pixels == 0) | (pixels >= LEAST_PIXELS))
    return known & (past.flatten(2).sum(-1) >= LEAST_PIXELS).any(1)


def _marks(past: Bool[Tensor, "n t s s"], rules: ClipRules, rng: np.random.Generator) -> Float[Tensor, "n t g g"]:
    """Return the fraction of each cell that an object covers, with marks removed at random.

    If all marks of an object would be removed, those of the latest frame that shows it are kept.
    """
    seen = past.flatten(2).any(-1)
    kept = seen & torch.from_numpy(rng.random(seen.shape) >= rules.lost)
    for row in np.flatnonzero(~kept.any(1).numpy()):
        kept[row, seen[row].nonzero()[-1]] = True
    return F.adaptive_avg_pool2d((past & kept[..., None, None]).float(), rules.marks)


class ClipDataset(Dataset[ClipItem]):
    """``rules.per_video`` clips of each video.

    A clip depends on ``seed``, ``epoch`` and its index only. If a video is damaged, does not fit its annotation or has
    fewer than two annotated frames, the clip of the next index takes its place, so training continues. Masks are never
    used with a frame of another video or size. Objects that are visible in no annotated frame are reported in ``bad``.
    """

    def __init__(
        self, source: VideoSource, transform: ViewTransform, keys: Sequence[str], rules: ClipRules, seed: int = 0,
        epoch: int = 0, read: Callable[[ClipItem], tuple[Tensor, ...]] | None = None,
    ) -> None:  # fmt: skip
        """Set up the data set without opening a video.

        Args:
            source: The videos.
            transform: Augmentation and geometry.
            keys: Keys of the videos, in order.
            rules: Rules of the clips.
            seed: Seed of the run.
            epoch: Number of the epoch.
            read: Function that reads a teacher's features of a clip. If it raises ``BadVideo``, another clip is used.

        Raises:
            UserError: A teacher's features are used and frames are augmented. A teacher sees unaugmented frames.
        """
        if rules.cached and transform.augment != AugmentConfig():
            raise UserError(
                "data.augment: a teacher's features are those of unaugmented frames; turn the augmentations off"
            )
        self.read = read
        self.source, self.transform, self.keys, self.rules = source, transform, list(keys), rules
        self.seed, self.epoch = seed, epoch

    @property
    def identity(self) -> Sequence[str]:
        """Strings that distinguish these clips from those of other data."""
        return self.keys

    def __len__(self) -> int:
        return len(self.keys) * self.rules.per_video

    def __getitem__(self, index: int) -> ClipItem:
        """Read clip ``index // len(keys)`` of video ``index % len(keys)``.

        Raises:
            UserError: 64 videos in a row are unusable, or all are.
        """
        return next_usable(self._clip, index, len(self), len(self.keys), "videos", "trained on")

    def _clip(self, index: int, bad: list[BadInput]) -> ClipItem:
        record = self.source.record(self.keys[index % len(self.keys)])
        rng = np.random.default_rng([self.seed, self.epoch, index])
        query, context = draw_clip(record, self.rules, rng)
        item = read_clip(self.source, record, query, context, self.transform, self.rules, rng)
        teacher_features = () if self.read is None else self.read(item)
        return replace(item, teacher_features=teacher_features, bad=(*bad, *record.problems))


@dataclass(frozen=True)
class ClipBatch:
    """b clips, padded to the largest number n of objects and t of context frames.

    In padded slots masks are empty, objects, frames and rows are -1, times and marks are 0, ``own`` is False, and the
    context canvas is ``PAD``.

    Attributes:
        images: The query frames.
        valid: False for padded object slots, (b, n).
        context_valid: False for padded context slots, (b, t).
        bad: Inputs that were unusable.

    The other attributes are those of ``ClipItem`` with a batch dimension.
    """

    images: ImageBatch
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
        """Return a copy with every tensor on ``device``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: v.to(device, non_blocking=True) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, images=self.images.to(device), **moved)


def collate_clips(items: Sequence[ClipItem]) -> ClipBatch:
    """Collate items into one batch, padded to the longest context and the most objects."""
    images, _ = collate_images([ImageItem(i.canvas, i.size, i.original_size, i.key, i.seed) for i in items])
    assert images is not None
    contexts = [item.context for item in items if item.context is not None]
    longest = max(len(item.context_rows) for item in items)
    marks = [F.pad(i.marks, (0, 0, 0, 0, 0, longest - i.marks.shape[1])) for i in items if i.marks is not None]
    return ClipBatch(
        images,
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
    """Stack tensors of different lengths, padded with ``value`` at the end."""
    rows = list(parts)
    filled = rows[0].new_full((len(rows), max(len(row) for row in rows), *rows[0].shape[1:]), value)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row)] = row
    return filled
