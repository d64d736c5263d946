"""Maps come back by what they are of, in the order asked; what is missing or of another view is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from samdistill.config import TeacherConfig
from samdistill.data import record_key, view_seed
from samdistill.store import FeatureStore, FeatureStoreWriter, StoreSpec, make_codec
from samdistill.teachers import RunningMaps, StoredMaps, build_teacher, frame_key
from samdistill.types import ImageBatch, UserError

FRAMES = {"sav_1": (0, 4, 8, 12), "sav_12": (0, 4), "odd@4": (4,), "odd": (4,)}


@pytest.fixture
def maps(tmp_path: Path) -> dict[tuple[str, int], Tensor]:
    """By video and frame, what the store in ``tmp_path`` holds."""
    spec = StoreSpec("fpn_level_3", (3, 2, 2), 126, "ab", "00", "fp16")
    generator, found = torch.Generator().manual_seed(0), {}
    with FeatureStoreWriter(tmp_path, spec, make_codec("fp16", spec.shape)) as writer:
        for key, numbers in FRAMES.items():
            for number in numbers:
                found[key, number] = torch.randn(3, 2, 2, generator=generator).half().float()
                writer.write(frame_key(key, number), 0, found[key, number])
    return found


def test_frames_come_back_in_the_order_asked(maps: dict[tuple[str, int], Tensor], tmp_path: Path) -> None:
    levels = StoredMaps.of_frames([FeatureStore(tmp_path)])
    assert levels.fingerprint == "ab"
    for again in (levels, pickle.loads(pickle.dumps(levels))):  # as a loader's worker has it
        for asked in ([*maps], [("sav_1", 12), ("odd", 4), ("sav_1", 12)]):
            (found,) = again.answer(asked, again.read(asked))
            assert found.dtype == torch.float32 and torch.equal(found, torch.stack([maps[frame] for frame in asked]))
        assert again.read([])[0].shape == (0, 3, 2, 2)
    assert len({frame_key(*frame) for frame in maps}) == len(maps) == len(FeatureStore(tmp_path))


def test_a_frame_that_was_not_cached_is_named(maps: dict[tuple[str, int], Tensor], tmp_path: Path) -> None:
    levels = StoredMaps.of_frames([FeatureStore(tmp_path)])
    with pytest.raises(UserError, match=rf"{tmp_path}: no record of 'sav_1@16' among {len(maps)}; cache it first"):
        levels.read([("sav_1", 12), ("sav_1", 16)])


@pytest.fixture
def views(tracker, tmp_path: Path) -> tuple[RunningMaps, StoredMaps, dict[int, ImageBatch]]:
    """A running encoder, its cache of two views of three images in two stores, and those views."""
    teacher = build_teacher(TeacherConfig(path=str(tracker[1])))
    running, batches, keys = RunningMaps(teacher, teacher.maps), {}, ("a", "b", "c")
    codec = make_codec("fp32", teacher.embedding_shape)
    spec = StoreSpec("image_embedding", teacher.embedding_shape, 126, teacher.fingerprint, "00", "fp32")
    places = [tmp_path / name for name in ("one", "two")]
    writers = [FeatureStoreWriter(place, spec, codec) for place in places]
    for view in (0, 1):
        pixels = torch.randint(0, 256, (3, 3, 126, 126), generator=torch.Generator().manual_seed(view)).byte()
        full = ImageBatch.full(pixels, keys)
        seeds = torch.tensor([view_seed(7, key, view) for key in keys])
        batches[view] = ImageBatch(full.images, full.sizes, full.original_sizes, keys, seeds)
        (found,) = running.answer(batches[view], ())
        for key, seed, own in zip(keys, seeds.tolist(), found, strict=True):
            for scale, writer in enumerate(writers, 1):
                writer.write(record_key(key, view), seed, scale * own)
    for writer in writers:
        writer.close()
    return running, StoredMaps.of_views([FeatureStore(place) for place in places], 7, 2), batches


def test_a_cache_says_what_the_running_teacher_says(views) -> None:
    running, stored, batches = views
    assert running.fingerprint == stored.fingerprint
    for batch in batches.values():
        (wanted,) = running.answer(batch, running.read(batch))
        found = stored.answer(batch, stored.read(batch))
        assert torch.equal(found[0], wanted) and torch.equal(found[1], 2 * wanted)


def test_a_worker_is_not_sent_the_teacher(views) -> None:
    running, _, batches = views
    there = pickle.dumps(running)
    assert len(there) < 1000 and pickle.loads(there).read(batches[0]) == ()


def test_a_record_of_another_view_is_refused_by_name(views) -> None:
    _, stored, batches = views
    full = batches[0]
    strange = ImageBatch(full.images, full.sizes, full.original_sizes, full.keys, full.seeds + torch.tensor([0, 1, 0]))
    with pytest.raises(UserError, match=r"^b: none of the 2 cached views is in the batch: set data.seed as it was"):
        stored.read(strange)
    other = StoredMaps.of_views(stored.stores, 8, 2)
    seeds = torch.tensor([view_seed(8, key, 1) for key in full.keys])
    batch = ImageBatch(full.images, full.sizes, full.original_sizes, full.keys, seeds)
    with pytest.raises(
        UserError, match=r"^a//1: the cache was made with augmentation seed \d+, this run draws \d+: set"
    ):
        other.read(batch)
