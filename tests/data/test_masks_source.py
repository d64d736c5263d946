"""Image + mask folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samdistill.config import DataConfig
from samdistill.data import SOURCES, BadImage, MaskFolderSource, open_source, read_image, upright_size
from samdistill.data.masks import find_mask_folders
from samdistill.types import UserError

REAL = Path(__file__).parents[3] / "shared" / "data" / "davis"
SIZE = (8, 10)


def ids(*boxes: tuple[int, int, int, int, int], dtype: type = np.uint8) -> np.ndarray:
    """A grid of zeros with value v in rows r..R and columns c..C for each (v, r, R, c, C)."""
    grid = np.zeros(SIZE, dtype)
    for value, top, bottom, left, right in boxes:
        grid[top:bottom, left:right] = value
    return grid


def save(path: Path, pixels: np.ndarray | None = None, palette: bool = False) -> None:
    """A photograph of ``SIZE``, or a mask: 16 bits where the array has them, indices of random colours with palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", SIZE[::-1], "white") if pixels is None else Image.fromarray(pixels)
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(path)


def found(source: MaskFolderSource, key: str) -> dict[int, int]:
    """Id to number of pixels."""
    return {instance.id: int(instance.mask.sum()) for instance in source.instances(key)}


@pytest.mark.parametrize(("images", "masks"), [("images", "masks"), ("JPEGImages", "Annotations")])
def test_an_id_png_per_image_at_any_depth(tmp_path: Path, images: str, masks: str) -> None:
    grid = ids((3, 0, 2, 0, 2), (1, 4, 8, 3, 9))
    for key, palette in (("chair/0001", True), ("chair/0002", False), ("a.b", True)):
        save(tmp_path / images / f"{key}.jpg")
        save(tmp_path / masks / f"{key}.png", grid, palette)
    source = SOURCES.get("masks")(tmp_path, None)
    assert source.keys == ["a.b", "chair/0001", "chair/0002"] and source.problems == [] and source.labelled
    assert source.path("chair/0001") == tmp_path / images / "chair/0001.jpg"
    for key in source.keys:
        one, three = source.instances(key)
        assert (one.id, three.id, one.category, one.crowd) == (1, 3, None, False)
        assert np.array_equal(one.mask, grid == 1) and np.array_equal(three.mask, grid == 3)
        assert source.phrases(key) == [] and source.boxes(key).tolist() == [[3, 4, 9, 8], [0, 0, 2, 2]]


def test_ids_of_16_bits_are_kept_apart(tmp_path: Path) -> None:
    save(tmp_path / "images/a.jpg")
    save(tmp_path / "masks/a.png", ids((1, 0, 1, 0, 1), (255, 1, 2, 0, 2), (256, 2, 3, 0, 3), (65535, 3, 4, 0, 4),
                                       dtype=np.uint16))  # fmt: skip
    assert found(MaskFolderSource(tmp_path, None), "a") == {1: 1, 255: 2, 256: 3, 65535: 4}


@pytest.mark.parametrize("palette", [True, False])
def test_255_is_void_beside_other_ids_and_the_object_alone(tmp_path: Path, palette: bool) -> None:
    for name, boxes in {
        "voc": [(255, 0, 6, 0, 6), (3, 1, 5, 1, 5)],
        "binary": [(255, 0, 3, 0, 3)],
        "none": [],
    }.items():
        save(tmp_path / f"images/{name}.jpg")
        save(tmp_path / f"masks/{name}.png", ids(*boxes), palette)
    save(tmp_path / "images/bits.jpg")
    Image.fromarray(ids((1, 0, 2, 0, 4)) > 0).save(tmp_path / "masks/bits.png")
    assert Image.open(tmp_path / "masks/bits.png").mode == "1"
    source = MaskFolderSource(tmp_path, None)
    assert {key: found(source, key) for key in source.keys} == {
        "binary": {255: 9}, "bits": {1: 8}, "none": {}, "voc": {3: 16},
    }  # fmt: skip


def test_a_folder_with_one_png_per_object(tmp_path: Path) -> None:
    save(tmp_path / "images/x/a.jpg")
    save(tmp_path / "masks/x/a/left.png", ids((255, 0, 2, 0, 2), (7, 2, 3, 0, 2)))  # whatever is not zero
    save(tmp_path / "masks/x/a/behind.png", ids())
    save(tmp_path / "masks/x/a/over.png", ids((1, 0, 4, 0, 4)), palette=True)
    source = MaskFolderSource(tmp_path, None)
    assert source.keys == ["x/a"] and source.problems == []
    assert found(source, "x/a") == {1: 0, 2: 6, 3: 16}  # in the order of the names; objects may overlap
    assert source.boxes("x/a").tolist() == [[0, 0, 0, 0], [0, 0, 2, 3], [0, 0, 4, 4]]


def test_an_image_named_like_a_folder_of_others_is_told_apart(tmp_path: Path) -> None:
    for name in ("images/a.jpg", "images/a/b.jpg"):
        save(tmp_path / name)
    save(tmp_path / "masks/a/b.png", ids((1, 0, 2, 0, 2)))  # an image's own mask comes before an object of ``a``
    save(tmp_path / "masks/a/c.png", ids((1, 0, 3, 0, 3)))
    source = MaskFolderSource(tmp_path, None)
    assert source.keys == ["a", "a/b"] and found(source, "a") == {1: 9} and found(source, "a/b") == {1: 4}


def test_what_has_no_counterpart_is_listed_with_its_reason(tmp_path: Path) -> None:
    for name in ("good.jpg", "lonely.jpg", "twice.jpg", "twice.png", "both.jpg", "lossy.jpg"):
        save(tmp_path / "images" / name)
    for name in ("good.png", "twice.png", "both.png", "both/1.png", "stray.png", "deep/er/stray.png", "lossy.jpg"):
        save(tmp_path / "masks" / name, ids((1, 0, 2, 0, 2)))
    (tmp_path / "masks/notes.txt").write_text("no mask")
    (tmp_path / "masks/lonely").mkdir()
    source = MaskFolderSource(tmp_path, None)
    assert source.keys == ["good", "twice"] and source.path("twice").name == "twice.jpg"
    assert sorted(source.problems) == [
        ("both", "has both an id PNG and a folder of masks; keep one"),
        ("deep/er/stray.png", "mask without image"),
        ("lonely", "image without mask"),
        ("lossy", "image without mask"),
        ("lossy.jpg", "a mask has to be a PNG: other formats do not keep ids exactly"),
        ("stray.png", "mask without image"),
        ("twice.png", "has the same name as twice.jpg, except for the suffix"),
    ]


@pytest.mark.parametrize("below", [True, False])
def test_parts(tmp_path: Path, below: bool) -> None:
    for part in ("train", "val"):
        for number in range(2):
            image, mask = (f"{part}/{kind}" if below else f"{kind}/{part}" for kind in ("images", "masks"))
            save(tmp_path / image / f"{part}{number}.jpg")
            save(tmp_path / mask / f"{part}{number}.png", ids((1, 0, 2, 0, 2)))
    assert MaskFolderSource.splits(tmp_path) == ["train", "val"]
    data = DataConfig(kind="masks", root=tmp_path)
    assert open_source(data, "train").keys == ["train0", "train1"]
    assert open_source(data, "held_out").keys == ["val0", "val1"]
    assert found(open_source(data, "held_out"), "val1") == {1: 4}  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / ("val/masks" if below else "masks/val"))
    with pytest.raises(UserError, match="no split 'val'" if below else "no image for data.kind=masks"):
        open_source(data, "held_out")


def test_videos_are_no_parts_even_if_one_is_called_train(tmp_path: Path) -> None:
    for video in ("train", "bear"):
        save(tmp_path / f"JPEGImages/{video}/0.jpg")
        save(tmp_path / f"Annotations/{video}/0.png", ids((1, 0, 2, 0, 2)))
    assert MaskFolderSource.splits(tmp_path) == []
    assert MaskFolderSource(tmp_path, None).keys == ["bear/0", "train/0"]


def test_pascal_voc_has_its_ids_beside_its_xml(tmp_path: Path) -> None:
    save(tmp_path / "JPEGImages/2007_1.jpg")
    save(tmp_path / "SegmentationObject/2007_1.png", ids((255, 0, 6, 0, 6), (1, 1, 5, 1, 5)), palette=True)
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations/2007_1.xml").write_text("<annotation/>")
    assert found(MaskFolderSource(tmp_path, None), "2007_1") == {1: 16}


def test_a_root_without_the_folders(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert find_mask_folders(tmp_path) == {}
    with pytest.raises(UserError, match="neither images/ beside masks/ nor"):
        open_source(DataConfig(kind="masks", root=tmp_path), "train")


def broken(path: Path) -> None:
    save(path, ids((1, 0, 2, 0, 2)))
    path.write_bytes(path.read_bytes()[:-25])


def coloured(path: Path) -> None:
    Image.new("RGB", SIZE[::-1], (255, 0, 0)).save(path)


def transparent(path: Path) -> None:
    Image.new("RGBA", SIZE[::-1], (255, 255, 255, 0)).save(path)


def disguised(path: Path) -> None:
    Image.new("L", SIZE[::-1]).save(path, format="JPEG")


def turned(path: Path) -> None:
    save(path, ids().T)


@pytest.mark.parametrize("name", ["masks/a.png", "masks/a/1.png"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(broken, r"a: .*\.png: not a readable mask: "), (lambda path: path.write_text("no"), "not a readable mask"),
     (coloured, "it is coloured; a mask is a palette or grey PNG"), (transparent, "it is transparent"),
     (disguised, "a JPEG file, not a PNG"), (turned, r"\.png is 8 x 10 pixels, its image 10 x 8")],
)  # fmt: skip
def test_unusable_masks_are_named(tmp_path: Path, name: str, spoil: object, reason: str) -> None:
    save(tmp_path / "images/a.jpg")
    (tmp_path / name).parent.mkdir(parents=True)
    spoil(tmp_path / name)  # type: ignore[operator]
    with pytest.raises(BadImage, match=reason):
        MaskFolderSource(tmp_path, None).instances("a")


def test_grey_written_as_colour_counts(tmp_path: Path) -> None:
    grid = ids((9, 0, 2, 0, 2))
    for name, mode in (("a", "RGB"), ("b", "RGBA"), ("c", "LA")):
        save(tmp_path / f"images/{name}.jpg")
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(grid).convert(mode).save(tmp_path / f"masks/{name}.png")
    source = MaskFolderSource(tmp_path, None)
    assert [found(source, key) for key in "abc"] == [{9: 4}] * 3


def test_a_lost_image_is_named_too(tmp_path: Path) -> None:
    save(tmp_path / "images/a.jpg")
    save(tmp_path / "masks/a.png", ids())
    source = MaskFolderSource(tmp_path, None)
    source.path("a").write_bytes(b"")
    with pytest.raises(BadImage, match=r"a: .*a\.jpg is not a readable image"):
        source.instances("a")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_masks_lie_on_the_upright_image(tmp_path: Path, suffix: str) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"images/a.{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (10, 8)).save(path, exif=exif)
        upright = read_image(path)
        assert upright_size(path) == (upright.height, upright.width)
        assert (upright.height > upright.width) == (orientation > 4)
        save(tmp_path / "masks/a.png", np.ones((upright.height, upright.width), np.uint8))
        assert found(MaskFolderSource(tmp_path, None), "a") == {1: 80}


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real DAVIS sample at {REAL}")
def test_real_annotations() -> None:
    source = MaskFolderSource(REAL, None)
    assert len(source.keys) == 60 and source.problems == [] and MaskFolderSource.splits(REAL) == []
    for key in source.keys[::7]:
        expected = np.asarray(Image.open(REAL / "Annotations" / f"{key}.png")) == 1
        (chair,) = source.instances(key)
        assert chair.id == 1 and np.array_equal(chair.mask, expected) and expected.any()
        image = source.load(key)
        assert chair.mask.shape == (image.height, image.width)
        rows, columns = np.nonzero(expected)
        assert source.boxes(key).tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
