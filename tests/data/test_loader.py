"""Datasets, batches and workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samdistill.config import AugmentConfig
from samdistill.data import (
    BadInput,
    FolderSource,
    Geometry,
    ImageDataset,
    ImageItem,
    ReadableImages,
    ViewTransform,
    collate_images,
    image_loader,
    record_key,
    view_seed,
)
from samdistill.types import UserError

AUGMENT = AugmentConfig(flip=0.5, crop_scale=(0.4, 1.0), brightness=0.3, hue=0.1)


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    rng = np.random.default_rng(0)
    for i in range(11):
        pixels = rng.integers(0, 256, (6, 5 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50 + 10 * i, 60)).save(tmp_path / f"{i:02d}.jpg")
    (tmp_path / "04.jpg").write_bytes((tmp_path / "04.jpg").read_bytes()[:300])
    (tmp_path / "08.jpg").write_bytes(b"")
    return FolderSource(tmp_path)


def dataset(source: FolderSource, seed: int = 0, view: int = 0) -> ImageDataset:
    return ImageDataset(source, ViewTransform(Geometry(28, "longest_side"), AUGMENT), source.keys, seed, view)


def test_an_item_carries_what_replays_it(source: FolderSource) -> None:
    images = dataset(source, seed=3, view=2)
    item = images[1]
    assert isinstance(item, ImageItem) and len(images) == 11
    assert (item.key, item.seed, item.original_size) == ("01.jpg", view_seed(3, "01.jpg", 2), (60, 60))
    replayed, size = images.transform(source.load("01.jpg"), item.seed)
    assert torch.equal(item.image, replayed) and item.size == size
    assert not torch.equal(item.image, dataset(source, seed=3, view=1)[1].image)  # type: ignore[union-attr]


def test_unreadable_images_are_listed_in_their_batch(source: FolderSource) -> None:
    batches = list(image_loader(dataset(source), 4))
    assert [batch.keys for batch, _ in batches if batch is not None] == [
        ("00.jpg", "01.jpg", "02.jpg", "03.jpg"), ("05.jpg", "06.jpg", "07.jpg"), ("09.jpg", "10.jpg"),
    ]  # fmt: skip
    assert [[b.key for b in bad] for _, bad in batches] == [[], ["04.jpg"], ["08.jpg"]]
    assert all("not a readable image" in b.reason for _, bad in batches for b in bad)


def test_the_next_readable_image_takes_the_place_of_a_broken_one_unless_it_was_cached(source: FolderSource) -> None:
    images = dataset(source)
    broken = [i for i, key in enumerate(images.keys) if isinstance(images[i], BadInput)]
    assert 0 < len(broken) < len(images)
    items = ReadableImages(images, cached=False)
    assert items.identity == images.keys and len(items) == len(images)
    good = [i for i in range(len(images)) if i not in broken]
    for index in range(len(images)):
        item, bad = items[index]
        turn = [(index + step) % len(images) for step in range(len(images))]
        following = next(i for i in turn if i in good)
        assert item.key == images.keys[following]
        assert [b.key for b in bad] == [images.keys[i] for i in turn[: turn.index(following)]]
    with pytest.raises(UserError, match=f"^{images.keys[broken[0]]}: cached, but no longer readable: "):
        _ = ReadableImages(images, cached=True)[broken[0]]
    with pytest.raises(UserError, match=r"1 images in a row cannot be read, first "):
        _ = ReadableImages(ImageDataset(source, images.transform, [images.keys[broken[0]]]), cached=False)[0]


def test_a_batch_has_the_documented_types(source: FolderSource) -> None:
    batch, _ = next(iter(image_loader(dataset(source), 3)))
    assert batch is not None and len(batch) == 3
    assert batch.images.shape == (3, 3, 28, 28) and batch.images.dtype == torch.uint8
    assert batch.sizes.dtype == batch.original_sizes.dtype == batch.seeds.dtype == torch.int64
    assert batch.original_sizes.tolist() == [[60, 50], [60, 60], [60, 70]]
    grid = batch.valid((28, 28))
    for i, (height, width) in enumerate(batch.sizes.tolist()):
        assert grid[i].sum() == height * width and bool(grid[i, :height, :width].all())


def test_nothing_readable_gives_no_batch() -> None:
    bad = [BadInput("a", "broken"), BadInput("b", "broken")]
    assert collate_images(bad) == (None, bad)


def test_batches_do_not_depend_on_workers(source: FolderSource) -> None:
    def everything(workers: int) -> list[tuple[object, ...]]:
        torch.manual_seed(workers)  # global state must not matter
        return [
            (b.images.numpy().tobytes(), b.sizes.tolist(), b.keys, b.seeds.tolist(), bad)
            for b, bad in image_loader(dataset(source), 3, workers)
            if b is not None
        ]

    reference = everything(0)
    assert len(reference) == 4
    assert everything(1) == reference and everything(2) == reference


def test_view_names_are_unique() -> None:
    names = [record_key(key, view) for key in ("a", "a/1", "a1", "1") for view in range(12)]
    assert len(set(names)) == len(names) and record_key("sa_1", 0) == "sa_1"
