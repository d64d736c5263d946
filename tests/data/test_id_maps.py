"""PNGs of ids: true maps are read, whatever they show; drawings with soft edges and pictures are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from samdistill.data import BadImage, BadVideo, DavisSource, MaskFolderSource
from samdistill.data.id_maps import drawn, object_ids, read_id_map

SHARED = Path(__file__).parents[3] / "shared" / "data"


def blobs(size: tuple[int, int], places: list[tuple[int, int, int]], values: list[int], over: int = 1) -> np.ndarray:
    """Discs, x, y and radius, of each value; drawn ``over`` times larger and scaled down, as drawing programs do."""
    height, width = size
    image = Image.new("L", (width * over, height * over))
    for (x, y, radius), value in zip(places, values, strict=True):
        box = [over * (x - radius), over * (y - radius), over * (x + radius), over * (y + radius)]
        ImageDraw.Draw(image).ellipse(box, fill=value)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


TWO = [(30, 30, 20), (90, 50, 25)]
SOFT = {
    "one object": blobs((96, 128), TWO[:1], [255], over=4),
    "two objects, one value": blobs((96, 128), TWO, [255, 255], over=8),
    "two objects, two values": blobs((96, 128), TWO, [255, 128], over=4),
    "not quite white": blobs((96, 128), TWO, [254, 254], over=4),
    "few levels": blobs((96, 128), TWO, [255, 255], over=2),
    "a small one": blobs((96, 128), [(30, 30, 4)], [255], over=4),
    "blurred": np.asarray(Image.fromarray(blobs((96, 128), TWO, [255, 255])).resize((40, 30)).resize((128, 96))),
    "as a palette": np.asarray(Image.fromarray(blobs((96, 128), TWO, [200, 200], over=4)).convert("P")),
}


@pytest.mark.parametrize("name", SOFT)
def test_masks_with_soft_edges_are_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    assert len(np.unique(SOFT[name])) > 3
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (128, 96)).save(tmp_path / "images/a.jpg")
    Image.fromarray(SOFT[name]).save(tmp_path / "masks/a.png")
    with pytest.raises(BadImage, match=r"a: .*a\.png holds no object ids: .*; draw masks without soft edges"):
        MaskFolderSource(tmp_path, None).instances("a")
    video = tmp_path / "video"
    for folder, picture in (("JPEGImages/v", np.zeros((96, 128, 3), np.uint8)), ("Annotations/v", SOFT[name])):
        (video / folder).mkdir(parents=True)
        Image.fromarray(picture).save(video / folder / "00000.png")
    with pytest.raises(BadVideo, match=r"v: .*00000\.png holds no object ids"):
        DavisSource(video).record("v")


def voronoi(count: int, seed: int, size: tuple[int, int] = (96, 128)) -> np.ndarray:
    """Touching regions, numbered at random."""
    rng = np.random.default_rng(seed)
    points, (y, x) = rng.random((count, 2)) * size, np.mgrid[: size[0], : size[1]]
    return (np.argmin([(y - a) ** 2 + (x - b) ** 2 for a, b in points], 0) + 1).astype(np.uint16)


def border(ids: np.ndarray) -> np.ndarray:
    """Pascal VOC's: 255 around every object."""
    found = ids.astype(np.uint8)
    for down in range(-2, 3):
        for across in range(-2, 3):
            found[np.roll(ids, (down, across), (0, 1)) != ids] = 255
    return found


def dots(count: int) -> np.ndarray:
    """Objects of two pixels, apart from each other."""
    ids = np.zeros((96, 128), np.uint16)
    for number in range(count):
        ids[3 * (number // 40), 3 * (number % 40) : 3 * (number % 40) + 2] = number + 1
    return ids


def grid(side: int) -> np.ndarray:
    """Touching cells, numbered row after row, as superpixels are."""
    return (np.arange(96)[:, None] // side * (128 // side) + np.arange(128)[None] // side + 1).astype(np.uint16)


TRUE = {
    "empty": np.zeros((9, 9), np.uint8), "binary": blobs((96, 128), TWO, [255, 255]), "bits": np.eye(9, dtype=np.uint8),
    "greys far apart": blobs((96, 128), [*TWO, (60, 80, 12)], [85, 170, 254]), "two": blobs((96, 128), TWO, [1, 2]),
    "many that touch": voronoi(400, 0), "voc": border(blobs((96, 128), TWO, [1, 2])),
    "voc, small objects": border(blobs((96, 128), [(30, 30, 4), (90, 50, 3)], [1, 2])), "dots": dots(900),
    "cells": grid(8), "small cells": grid(4), "cityscapes": border(blobs((96, 128), TWO, [26, 33])),
    "thin": np.where(np.arange(128)[None] % 9 == 0, np.arange(96)[:, None] // 12 + 1, 0).astype(np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("name", TRUE)
def test_true_maps_of_ids_are_read(tmp_path: Path, name: str) -> None:
    ids = TRUE[name]
    assert drawn(ids) is None
    Image.fromarray(ids).save(tmp_path / "a.png")
    found = set(np.unique(ids).tolist()) - {0}
    void = {255} if ids.dtype == np.uint8 and len(found) > 1 else set()
    assert object_ids(tmp_path / "a.png", read_id_map(tmp_path / "a.png")) == sorted(found - void)


def test_the_largest_object_is_not_lost_to_the_border() -> None:
    """255 is a border beside ids; where greys stand for objects, it would be the largest of them."""
    assert "255 is a border, but it covers most" in (
        drawn(blobs((96, 128), [*TWO, (60, 80, 12)], [85, 255, 170])) or ""
    )
    y, x = np.mgrid[:192, :960]
    assert "as in a shaded picture" in (drawn(((x + y) // 5 + 1).astype(np.uint8)) or "")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real DAVIS, COCO and SA-1B sample at {SHARED}")
def test_real_maps_are_read() -> None:
    """DAVIS' own, and every object of COCO and SA-1B photographs in one map, some of them a few pixels."""
    from samdistill.data import CocoSource, Sa1bSource

    for path in sorted((SHARED / "davis" / "Annotations").rglob("*.png"))[::5]:
        assert drawn(read_id_map(path)) is None
    for source in (CocoSource(SHARED / "coco", None), Sa1bSource(SHARED / "sa1b", None)):
        for key in source.keys[::3]:
            ids = np.zeros(source.check(key), np.uint16)
            for number, instance in enumerate(source.instances(key), 1):
                ids[instance.mask] = number
            assert drawn(ids) is None, key
