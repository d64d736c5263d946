"""``samdistill cache`` of the video job: one pyramid level of every annotated frame, and what training needs of it.

A record is of one frame: a clip reads a few frames of a video, and the records of a store are all of one size.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...data import BadInput, BadVideo, VideoSource, ViewTransform, leave_out, worker_count
from ...data.fingerprints import fingerprints
from ...data.sources import evenly
from ...dist import process_rank
from ...processes import outlive_signals
from ...progress import Progress
from ...store import Codec, FeatureStore, FeatureStoreWriter
from ...store.changes import Renewal, refuse_changed
from ...store.spec import MANIFEST, Manifest
from ...teachers import CachedLevels, Sam3Detector, frame_key
from ...types import ImageBatch, UserError
from ..caching import (
    FIT_IMAGES,
    CacheCall,
    CacheReport,
    left_out_of,
    list_skipped,
    settled_codec,
    verify_files,
    verify_record,
)
from .config import VideoRunConfig
from .parts import VideoParts

TOGETHER = 16
"""Frames decoded in one go, where blocks are smaller: a video with few key frames is decoded anew from its last one for
each group. Kept low because they are held at the size of the file."""
T = TypeVar("T")
Videos = dict[str, tuple[int, ...]]
"""Numbers of the annotated frames of each video."""


class _Group(NamedTuple):
    """Some frames of a video. problems: parts of its annotation that are left out."""

    key: str
    frames: tuple[int, ...]
    problems: tuple[BadInput, ...] = ()


class _Records(Dataset[_Group | BadInput]):
    """All annotated frames of each video, or why it cannot be used."""

    def __init__(self, source: VideoSource, keys: Sequence[str]) -> None:
        self.source, self.keys = source, list(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> _Group | BadInput:
        try:
            record = self.source.record(self.keys[index])
            return _Group(record.key, record.annotated, record.problems)
        except BadVideo as error:
            return error.bad


class _Canvases(Dataset[UInt8[Tensor, "t 3 s s"] | BadInput]):
    """The frames of each group on the teacher's canvas, or why they cannot be decoded."""

    def __init__(self, source: VideoSource, view: ViewTransform, groups: Sequence[_Group]) -> None:
        self.source, self.view, self.groups = source, view, list(groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> UInt8[Tensor, "t 3 s s"] | BadInput:
        key, numbers, _ = self.groups[index]
        try:
            frames = self.source.frames(key, numbers)
        except BadVideo as error:
            return error.bad
        return torch.stack([self.view(Image.fromarray(frame), 0)[0] for frame in frames])


def _as_it_is(item: T) -> T:
    return item


def _loaded(dataset: Dataset[T], workers: int) -> DataLoader[T]:
    """The items one by one, in order, made beside the teacher's work."""
    processes = worker_count(workers)
    return DataLoader(
        dataset, batch_size=None, num_workers=processes, collate_fn=_as_it_is, worker_init_fn=outlive_signals
    )


def annotated(parts: VideoParts, keys: Sequence[str], progress: bool = False) -> tuple[Videos, list[BadInput]]:
    """The annotated frames of those of ``keys`` that can be used, and the others. No frame is decoded."""
    videos, bad = Videos(), list[BadInput]()
    if keys:
        with Progress("reading", len(keys), "videos", progress) as bar:
            for found in _loaded(_Records(parts.train_source, keys), parts.config.data.workers):
                if isinstance(found, BadInput):
                    bad.append(found)
                else:
                    videos[found.key] = found.frames
                    leave_out(found.problems)
                bar.advance()
    return videos, bad


def cache_levels(config: VideoRunConfig, call: CacheCall) -> CacheReport:
    """Write what is missing of the teacher's maps; see ``pipeline.cache``. A rank takes every ``world``-th video whole."""
    start, rank, world, verify = time.monotonic(), call.rank, call.world, call.verify
    parts, shown = VideoParts(config), call.progress and rank == 0
    source, root = parts.train_source, config.store_root
    teacher = parts.teacher(call.device)
    spec = parts.store_spec(teacher.fingerprint)
    _refuse_other_shape(parts, teacher)
    codec = settled_codec(root, spec, rank, verify, lambda: _sample(parts, teacher))
    videos, bad = annotated(parts, source.keys[rank::world], shown)
    with FeatureStoreWriter(root, spec, codec, rank, world) as writer:
        renewal = Renewal(root, rank, world, source_fingerprints(source, videos), writer.done)
        writer.expire(renewal.stale)
        broken, written = _write(parts, teacher, writer, videos, shown)
        renewed = renewal.conclude(writer.done)
    bad += broken.values()
    skipped = list_skipped(root, rank, [*(source.problems if rank == 0 else ()), *bad])
    store, whole = FeatureStore(root, spec), {key: videos[key] for key in videos if key not in broken}
    if world == 1 and not whole:  # others may do better than this process
        raise UserError(f"{root}: not one video could be cached; the first: {bad[0].key}: {bad[0].reason}")
    checked, worst = _verify(parts, store, codec, teacher, whole, rank, world) if verify else (0, 0.0)
    return CacheReport(
        str(root), store.spec.codec, len(store), written, len(store) * store.bytes_per_record, store.bytes_per_record,
        time.monotonic() - start, skipped, writer.recovered, checked, worst, renewed,
    )  # fmt: skip


def source_fingerprints(source: VideoSource, videos: Videos) -> dict[str, str]:
    """Of the video that the record of each frame is of."""
    found = fingerprints(source.fingerprint, videos)
    return {frame_key(key, number): found[key] for key, frames in videos.items() for number in frames}


def _refuse_other_shape(parts: VideoParts, teacher: Sam3Detector) -> None:
    """Records have the shape that the teacher's configuration promises; whether it keeps that, a grey image tells."""
    side = teacher.image_size
    levels = teacher.pyramid(ImageBatch.full(torch.full((1, 3, side, side), 128, dtype=torch.uint8)))
    found = [tuple(level.shape[1:]) for level in levels]
    if parts.level >= len(found) or found[parts.level] != parts.shape:
        shapes = ", ".join("x".join(map(str, shape)) for shape in found)
        raise UserError(
            f"{parts.config.teacher.path}: its pyramid is {shapes}, but level {parts.level} should be "
            f"{'x'.join(map(str, parts.shape))} as its config.json says; give another teacher.path"
        )


def _groups(videos: Mapping[str, Sequence[int]], block: int) -> Iterator[_Group]:
    """Groups of whole blocks of ``block`` frames, video by video. They are cut from all frames, whatever is done."""
    size = block * max(1, TOGETHER // block)
    for key, frames in videos.items():
        for start in range(0, len(frames), size):
            yield _Group(key, tuple(frames[start : start + size]))


def _extract(
    parts: VideoParts, teacher: Sam3Detector, groups: Sequence[_Group]
) -> Iterator[tuple[_Group, Float[Tensor, "t c h w"] | BadInput]]:
    """Each group and its maps on the CPU, or why its frames cannot be decoded, in order.

    The teacher is asked block by block, always cut in the same place: its last bits may depend on the others of a
    block, and a resumed run writes what an uninterrupted one does.
    """
    if not groups:
        return
    config = parts.config
    canvases = _loaded(_Canvases(parts.train_source, parts.cached_view, groups), config.data.workers)
    for group, images in zip(groups, canvases, strict=True):
        if isinstance(images, BadInput):
            yield group, images
            continue
        blocks = (ImageBatch.full(block) for block in images.split(config.cache.batch_size))
        levels = [teacher.pyramid(block.to(teacher.device))[parts.level].cpu() for block in blocks]
        yield group, torch.cat(levels)


def _spread(videos: Videos, count: int) -> list[_Group]:
    """``count`` frames spread evenly over all, each a group of its own."""
    keys, ends = list(videos), list(accumulate(map(len, videos.values())))
    found = []
    for place in evenly(range(ends[-1] if ends else 0), count):
        key = keys[at := bisect_right(ends, place)]
        found.append(_Group(key, (videos[key][place - ends[at]],)))  # counted from the end of the video
    return found


def _sample(parts: VideoParts, teacher: Sam3Detector) -> Iterator[Float[Tensor, "c h w"]]:
    """Maps that a codec is fitted on."""
    videos, _ = annotated(parts, evenly(parts.train_source.keys, FIT_IMAGES))
    for _, levels in _extract(parts, teacher, _spread(videos, FIT_IMAGES)):
        if not isinstance(levels, BadInput):
            yield from levels


def _write(
    parts: VideoParts, teacher: Sam3Detector, writer: FeatureStoreWriter, videos: Videos, progress: bool
) -> tuple[dict[str, BadInput], int]:
    """Fill the store with what it lacks of ``videos``: those that turned out to be broken, and the number of records
    written. Of a broken one nothing more is written; what was, stays, and is not read."""
    broken, written = dict[str, BadInput](), 0
    wanted = [
        group
        for group in _groups(videos, parts.config.cache.batch_size)
        if not all(frame_key(group.key, number) in writer.done for number in group.frames)
    ]
    with Progress("caching", sum(len(group.frames) for group in wanted), "frames", progress) as bar:
        for (key, numbers, _), levels in _extract(parts, teacher, wanted):
            if isinstance(levels, BadInput):
                broken.setdefault(key, levels)
            elif key not in broken:
                for number, level in zip(numbers, levels, strict=True):
                    if (name := frame_key(key, number)) not in writer.done:
                        writer.write(name, 0, level)  # 0: no view of a video is augmented
                        written += 1
            bar.advance(len(numbers))
    return broken, written


def _verify(
    parts: VideoParts, store: FeatureStore, codec: Codec, teacher: Sam3Detector, videos: Videos, rank: int,
    world: int,
) -> tuple[int, float]:  # fmt: skip
    """Checksums of all records, then a sample of the frames of ``videos`` asked again: how many, and the worst
    difference."""
    verify_files(store, rank, world)
    errors = [
        verify_record(store, codec, frame_key(key, numbers[0]), levels[0])
        for (key, numbers, _), levels in _extract(parts, teacher, _spread(videos, parts.config.cache.verify_records))
        if not isinstance(levels, BadInput)
    ]
    return len(errors), max(errors, default=0.0)


def open_levels(parts: VideoParts) -> FeatureStore:
    """The run's store, its level, shape, size, transform and codec held against the config: no weights are read."""
    root = parts.config.store_root
    if not (root / MANIFEST).is_file():
        raise UserError(f"{root}: no cached features here; run `samdistill cache` with this config first")
    return FeatureStore(root, parts.store_spec(Manifest.load(root).spec.teacher))


def prove(parts: VideoParts, store: FeatureStore) -> None:
    """On rank 0 the teacher itself is loaded: its weights must be those that were cached."""
    if process_rank() == 0:
        Manifest.load(store.root).require(store.root, parts.store_spec(parts.teacher().fingerprint))


def complete_videos(parts: VideoParts, store: FeatureStore) -> tuple[list[str], list[BadInput]]:
    """Keys of the training videos of which every annotated frame is cached, and the videos that cannot be used: those
    that the cache left out, and what has broken since.

    Raises ``UserError`` for a video that is neither, and where none is complete.
    """
    root, levels, keys = store.root, CachedLevels(store), parts.train_source.keys
    videos, bad = annotated(parts, keys)
    left_out, whole, torn = left_out_of(root, parts.train_source), list[str](), list[str]()
    for key, frames in videos.items():
        missing = len(levels.missing(key, frames))
        if missing == 0:
            whole.append(key)
        elif key in left_out:
            bad.append(left_out[key])
        else:
            torn.append(f"{key}: {len(frames) - missing} of {len(frames)} frames")
    if torn:
        raise UserError(
            f"{root}: {len(torn)} of {len(keys)} videos are not wholly cached, first {torn[0]}; run `samdistill cache` "
            "with this config again, it resumes"
        )
    if not whole:
        raise UserError(f"{root}: not one video can be trained on; the first: {bad[0].key}: {bad[0].reason}")
    if process_rank() == 0:
        refuse_changed(root, source_fingerprints(parts.train_source, {key: videos[key] for key in whole}))
    return whole, bad
