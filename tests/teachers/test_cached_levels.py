"""Maps of frames come back by video and number, and the missing ones are named."""

import pickle
from pathlib import Path

import pytest
import torch

from samdistill.store import FeatureStore, FeatureStoreWriter, StoreSpec, make_codec
from samdistill.teachers import CachedLevels, frame_key
from samdistill.types import UserError

FRAMES = {"sav_1": (0, 4, 8, 12), "sav_12": (0, 4), "odd@4": (4,), "odd": (4,)}


@pytest.fixture
def maps(tmp_path: Path) -> dict[tuple[str, int], torch.Tensor]:
    """By video and frame, what the store in ``tmp_path`` holds."""
    spec = StoreSpec("fpn_level_3", (3, 2, 2), 126, "ab", "00", "fp16")
    generator, found = torch.Generator().manual_seed(0), {}
    with FeatureStoreWriter(tmp_path, spec, make_codec("fp16", spec.shape)) as writer:
        for key, numbers in FRAMES.items():
            for number in numbers:
                found[key, number] = torch.randn(3, 2, 2, generator=generator).half().float()
                writer.write(frame_key(key, number), 0, found[key, number])
    return found


def test_frames_come_back_in_the_order_asked(maps, tmp_path):
    levels = CachedLevels(FeatureStore(tmp_path))
    for again in (levels, pickle.loads(pickle.dumps(levels))):  # as a loader's worker has it
        for key, numbers in FRAMES.items():
            found = again.read(key, numbers)
            assert found.dtype == torch.float32 and torch.equal(found, torch.stack([maps[key, n] for n in numbers]))
        some = again.read("sav_1", [12, 0, 12])
        assert torch.equal(some, torch.stack([maps["sav_1", n] for n in (12, 0, 12)]))
        assert again.read("sav_1", []).shape == (0, 3, 2, 2)


def test_a_frame_that_was_not_cached_is_named(maps, tmp_path):
    levels = CachedLevels(FeatureStore(tmp_path))
    assert levels.missing("sav_1", range(0, 24, 4)) == [16, 20] and levels.missing("sav_1", (0, 12)) == []
    assert levels.missing("sav_1", [5]) == [5] and levels.missing("sav_2", [0]) == [0]
    with pytest.raises(UserError) as error:
        levels.read("sav_1", range(0, 24, 4))
    assert str(error.value) == (
        f"{tmp_path}: frame 16 of sav_1 is not cached (4 of 6 are); run `samdistill cache` with this config again"
    )


def test_videos_and_frames_never_share_a_record(maps, tmp_path):
    assert len({frame_key(key, number) for key, number in maps}) == len(maps) == len(FeatureStore(tmp_path))
