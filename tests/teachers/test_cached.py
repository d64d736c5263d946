"""The cached teacher gives what the online one gave, and says which records it lacks."""

import pytest
import torch

from samdistill.config import TeacherConfig
from samdistill.store import FeatureStore, FeatureStoreWriter, StoreSpec, make_codec
from samdistill.teachers import CachedTeacher, build_teacher
from samdistill.types import ImageBatch, UserError


def make(tmp_path, folder):
    teacher = build_teacher(TeacherConfig(path=str(folder)))
    pixels = torch.randint(0, 256, (3, 3, 126, 126), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = ImageBatch.full(pixels, ("a", "b", "c"))
    spec = StoreSpec(
        tap="image_embedding", shape=teacher.embedding_shape, image_size=teacher.image_size,
        teacher=teacher.fingerprint, transform="00", codec="fp16",
    )  # fmt: skip
    features = teacher.extract(batch)["image_embedding"]
    with FeatureStoreWriter(tmp_path, spec, make_codec("fp16", spec.shape)) as writer:
        for key, feature in zip(batch.keys, features, strict=True):
            writer.write(key, 0, feature)
    return teacher, batch, features, CachedTeacher(FeatureStore(tmp_path))


def test_records_come_back_by_key_in_the_batchs_order(tracker, tmp_path):
    teacher, batch, features, cached = make(tmp_path, tracker[1])
    assert (cached.image_size, cached.embedding_shape) == (teacher.image_size, teacher.embedding_shape)
    assert cached.fingerprint == teacher.fingerprint and set(cached.taps) == set(teacher.taps)
    swapped = ImageBatch.full(batch.images[:2], ("c", "a"))
    found = cached.extract(swapped)["image_embedding"]
    assert found.dtype == torch.float32
    assert torch.equal(found, features[[2, 0]].half().float())


def test_missing_records_are_named(tracker, tmp_path):
    _, batch, _, cached = make(tmp_path, tracker[1])
    with pytest.raises(UserError, match=r"2 images are not in the feature store, such as 'x'"):
        cached.extract(ImageBatch.full(batch.images, ("a", "x", "y")))


def test_a_record_of_another_view_is_refused(tracker, tmp_path):
    _, batch, _, cached = make(tmp_path, tracker[1])
    other = ImageBatch(batch.images, batch.sizes, batch.original_sizes, batch.keys, torch.tensor([0, 5, 0]))
    with pytest.raises(UserError, match=r"1 records .* another augmented view .*'b'"):
        cached.extract(other)


def test_an_unknown_tap_is_refused(tracker, tmp_path):
    _, batch, _, cached = make(tmp_path, tracker[1])
    with pytest.raises(UserError, match="did you mean 'image_embedding'"):
        cached.extract(batch, ["image_embeddings"])
