"""Cache of the video job: one FPN level of every annotated frame.

A record is one frame, because a clip reads few frames of a video and records of a store have one size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
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
from ...store import FeatureStore
from ...store.changes import refuse_changed
from ...teachers import Sam3Detector, frame_key
from ...types import ImageBatch, UserError
from ..caching import FIT_IMAGES, CacheCall, left_out_of, refuse_online
from ..recording import Block, Computed, Record, RecordSource
from .config import VideoRunConfig
from .parts import VideoParts, refuse_other_shape

TOGETHER = 16
"""Number of frames decoded together if blocks are smaller. For each group, decoding starts at the last key frame, which
may be far away. The number is low, because frames are in memory at their original size.
"""
T = TypeVar("T")
Videos = dict[str, tuple[int, ...]]
"""Numbers of the annotated frames, by video."""


class _Group(NamedTuple):
    """Frames of a video, and the parts of its annotation that are left out."""

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
    """Frames of each group on the teacher's canvas, or why they cannot be decoded."""

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
    """Return the items one by one, in order, made in loader workers."""
    processes = worker_count(workers)
    return DataLoader(
        dataset, batch_size=None, num_workers=processes, collate_fn=_as_it_is, worker_init_fn=outlive_signals
    )


def annotated(parts: VideoParts, keys: Sequence[str], progress: bool = False) -> tuple[Videos, list[BadInput]]:
    """Return the annotated frames of usable videos, and the unusable inputs. No frame is decoded."""
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


class Levels(RecordSource):
    """Record source with one record (c, h, w) per annotated frame. Each process caches whole videos."""

    unit = "frames"

    def __init__(self, config: VideoRunConfig, call: CacheCall) -> None:
        refuse_online(config)
        self.parts, self.call = VideoParts(config), call
        self.keys = self.parts.train_source.keys[call.rank :: call.world]
        self.teacher = self.parts.teacher(call.device)
        self.root = config.store_root
        self.specs = self.parts.specs(self.teacher.fingerprint)
        refuse_other_shape(self.parts, self.teacher)
        self.broken = dict[str, BadInput]()

    @cached_property
    def _annotated(self) -> tuple[Videos, list[BadInput]]:
        return annotated(self.parts, self.keys, self.call.progress and self.call.rank == 0)

    @property
    def whole(self) -> Videos:
        """Videos of this process that have not failed to decode so far."""
        return {key: frames for key, frames in self._annotated[0].items() if key not in self.broken}

    @property
    def problems(self) -> Sequence[BadInput]:
        listed = self.parts.train_source.problems if self.call.rank == 0 else ()
        return [*listed, *self._annotated[1]]

    def blocks(self) -> Sequence[Block]:
        groups = _groups(self._annotated[0], self.parts.config.cache.batch_size)
        return [Block([frame_key(group.key, number) for number in group.frames], group) for group in groups]

    def compute(self, blocks: Sequence[Block]) -> Iterator[Computed]:
        """Yield the records of each block.

        After a decoding error, no more records of the video are made. Those in the cache are kept and not read.
        """
        for (key, numbers, _), levels in _extract(self.parts, self.teacher, [block.about for block in blocks]):
            if isinstance(levels, BadInput):
                first = key not in self.broken
                self.broken.setdefault(key, levels)
                yield Computed((), (levels,) if first else ())
            elif key in self.broken:
                yield Computed(())
            else:  # the seed is 0, because videos are not augmented
                found = zip(numbers, levels, strict=True)
                yield Computed([Record(frame_key(key, number), 0, {"": level}) for number, level in found])

    def fingerprints(self) -> Mapping[str, str]:
        return source_fingerprints(self.parts.train_source, self._annotated[0])

    def sample(self, store: str) -> Iterator[Float[Tensor, "c h w"]]:
        videos, _ = annotated(self.parts, evenly(self.parts.train_source.keys, FIT_IMAGES))
        for _, levels in _extract(self.parts, self.teacher, _spread(videos, FIT_IMAGES)):
            if not isinstance(levels, BadInput):
                yield from levels

    def probe(self, done: Collection[str]) -> Iterator[Record]:
        sample = _spread(self.whole, self.parts.config.cache.verify_records)
        for (key, numbers, _), levels in _extract(self.parts, self.teacher, sample):
            if not isinstance(levels, BadInput):
                yield Record(frame_key(key, numbers[0]), 0, {"": levels[0]})

    def usable(self, records: int) -> bool:
        return bool(self.whole)


def source_fingerprints(source: VideoSource, videos: Videos) -> dict[str, str]:
    """Return the fingerprint of the video of each record."""
    found = fingerprints(source.fingerprint, videos)
    return {frame_key(key, number): found[key] for key, frames in videos.items() for number in frames}


def _groups(videos: Mapping[str, Sequence[int]], block: int) -> Iterator[_Group]:
    """Yield groups of whole blocks of ``block`` frames, for each video. They do not depend on what is cached."""
    size = block * max(1, TOGETHER // block)
    for key, frames in videos.items():
        for start in range(0, len(frames), size):
            yield _Group(key, tuple(frames[start : start + size]))


def _extract(
    parts: VideoParts, teacher: Sam3Detector, groups: Sequence[_Group]
) -> Iterator[tuple[_Group, Float[Tensor, "t c h w"] | BadInput]]:
    """Yield each group in order, with its maps on the CPU or with the reason why its frames cannot be decoded.

    The teacher runs on blocks with fixed boundaries. Its last bits may depend on the other images of a block, so a
    resumed run writes the same records as an uninterrupted one.
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
    """Return ``count`` frames spread evenly over all videos, each as its own group."""
    keys, ends = list(videos), list(accumulate(map(len, videos.values())))
    found = []
    for place in evenly(range(ends[-1] if ends else 0), count):
        key = keys[at := bisect_right(ends, place)]
        found.append(_Group(key, (videos[key][place - ends[at]],)))  # a negative index, from the end of the video
    return found


def complete_videos(parts: VideoParts, store: FeatureStore) -> tuple[list[str], list[BadInput]]:
    """Return the keys of training videos with all annotated frames in the cache, and the unusable inputs.

    Args:
        parts: Parts of the run.
        store: The cache.

    Raises:
        UserError: A video is neither complete nor listed as skipped, or no video is complete.
    """
    root, keys = store.root, parts.train_source.keys
    videos, bad = annotated(parts, keys)
    left_out, whole, torn = left_out_of(root, parts.train_source), list[str](), list[str]()
    for key, frames in videos.items():
        missing = sum(frame_key(key, frame) not in store for frame in frames)
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
