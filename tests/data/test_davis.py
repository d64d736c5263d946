"""Videos as folders: DAVIS' ids and SA-V's folder per object."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samdistill.data.davis import DavisSource
from samdistill.data.skipped import BadInput
from samdistill.data.videos import BadVideo, open_videos
from samdistill.types import UserError

REAL = Path(__file__).parents[3] / "shared" / "data" / "davis"
SIZE = (8, 10)


def ids(*boxes: tuple[int, int, int, int, int], dtype: type = np.uint8) -> np.ndarray:
    """A grid of zeros with value v in rows r..R and columns c..C for each (v, r, R, c, C)."""
    grid = np.zeros(SIZE, dtype)
    for value, top, bottom, left, right in boxes:
        grid[top:bottom, left:right] = value
    return grid


def save(path: Path, pixels: np.ndarray, palette: bool = False) -> None:
    """An image, or a mask whose palette is of random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(path)


def frames(folder: Path, count: int, suffix: str = "jpg") -> None:
    """Flat frames whose grey value is ten times their number."""
    for number in range(count):
        save(folder / f"{number:05d}.{suffix}", np.full((*SIZE, 3), 10 * number, np.uint8))


@pytest.mark.parametrize("resolution", ["", "480p", "Full-Resolution"])
@pytest.mark.parametrize("palette", [True, False])
def test_ids_of_all_objects_in_a_png(tmp_path: Path, resolution: str, palette: bool) -> None:
    images, masks = tmp_path / "JPEGImages" / resolution / "bear", tmp_path / "Annotations" / resolution / "bear"
    frames(images, 6)
    grids = {
        0: ids((3, 0, 2, 0, 2), (1, 4, 8, 3, 9)), 2: ids((3, 1, 3, 0, 2)), 5: ids(),
        3: ids((1, 0, 8, 0, 5), (255, 0, 8, 5, 6)),
    }  # fmt: skip
    for number, grid in grids.items():
        save(masks / f"{number:05d}.png", grid, palette)
    source = DavisSource(tmp_path)
    record = source.record("bear")
    assert source.keys == ["bear"] and source.problems == [] and source.path("bear") == images
    assert (record.size, record.frames, record.rate, record.annotated) == (SIZE, 6, 24.0, (0, 2, 3, 5))
    assert record.objects == (1, 3) and record.concepts == () and record.problems == () and record.labelled.all()
    assert record.visible.tolist() == [[True, True], [False, True], [True, False], [False, False]]
    for number, grid in grids.items():
        assert np.array_equal(source.masks("bear", number), [grid == 1, grid == 3])
    found = source.frames("bear", [4, 1, 4])
    assert found.shape == (3, *SIZE, 3) and np.abs(found.mean((1, 2, 3)) - [40, 10, 40]).max() < 1
    with pytest.raises(ValueError, match="frame 1 of bear is not annotated"):
        source.masks("bear", 1)
    with pytest.raises(IndexError, match="frame 6 of bear, which has 6"):
        source.frames("bear", [6])


def test_255_is_void_where_the_video_has_other_ids_and_the_object_where_it_has_none(tmp_path: Path) -> None:
    void = ids((255, 0, 2, 0, 2))
    for key, first in {"many": ids((2, 0, 1, 0, 1)), "binary": ids()}.items():
        frames(tmp_path / "JPEGImages" / key, 2)
        save(tmp_path / "Annotations" / key / "00000.png", first)
        save(tmp_path / "Annotations" / key / "00001.png", void)
    frames(tmp_path / "JPEGImages/deep", 2)
    deep = ids((255, 0, 1, 0, 1), (300, 3, 4, 3, 4), dtype=np.uint16)
    save(tmp_path / "Annotations/deep/00000.png", deep)
    save(tmp_path / "Annotations/deep/00001.png", ids((7, 0, 1, 0, 1)))
    source = DavisSource(tmp_path)
    assert {key: source.record(key).objects for key in source.keys} == {
        "binary": (255,), "deep": (7, 255, 300), "many": (2,),
    }  # fmt: skip
    assert source.record("many").visible.tolist() == [[True], [False]]
    assert source.masks("deep", 1).sum((1, 2)).tolist() == [1, 0, 0]
    assert np.array_equal(source.masks("binary", 1)[0], void == 255)


@pytest.fixture
def sav_val(tmp_path: Path) -> Path:
    """Two objects that overlap; object 0 hides in frame 4, object 12 is labelled from frame 4 on."""
    frames(tmp_path / "JPEGImages_24fps/sav_5", 10)
    folder = tmp_path / "Annotations_6fps/sav_5"
    save(folder / "000/00000.png", ids((1, 0, 4, 0, 4)))
    save(folder / "000/00004.png", ids())
    save(folder / "000/00008.png", ids((255, 0, 3, 0, 3)), palette=True)
    for number in (4, 8):
        save(folder / f"012/{number:05d}.png", ids((1, 0, 8, 0, 2)))
    return tmp_path


def test_a_folder_per_object(sav_val: Path) -> None:
    source = open_videos(sav_val, "davis", "train", 0)
    record = source.record("sav_5")
    assert record.objects == (0, 12) and record.annotated == (0, 4, 8) and record.frames == 10
    assert record.visible.tolist() == [[True, False], [False, True], [True, True]]
    assert record.labelled.tolist() == [[True, False], [True, True], [True, True]]
    assert [source.masks("sav_5", i).sum((1, 2)).tolist() for i in (0, 4, 8)] == [[16, 0], [0, 16], [9, 16]]
    empty = sav_val / "Annotations_6fps/sav_5/003"
    save(empty / "00000.png", ids())
    record = DavisSource(sav_val).record("sav_5")
    assert record.objects == (0, 12) and record.visible.shape == (3, 2)
    assert record.problems == (BadInput("sav_5, object 3", "it appears in no annotated frame"),)


def test_what_does_not_belong_is_named(sav_val: Path) -> None:
    folder = sav_val / "Annotations_6fps/sav_5"
    save(folder / "000/00099.png", ids((1, 0, 1, 0, 1)))
    save(folder / "000/00001.jpg", ids((1, 0, 1, 0, 1)))
    save(folder / "dog/00000.png", ids((1, 0, 1, 0, 1)))
    (folder / ".DS_Store").touch()
    frames(sav_val / "JPEGImages_24fps/alone", 1)
    save(sav_val / "Annotations_6fps/lost/00000.png", ids())
    source = DavisSource(sav_val)
    record = source.record("sav_5")
    assert record.objects == (0, 12) and record.annotated == (0, 4, 8)
    assert sorted(record.problems) == [
        ("sav_5/000/00001.jpg", "a mask has to be a PNG: other formats do not keep ids exactly"),
        ("sav_5/000/00099.png", "mask without frame"),
        ("sav_5/dog", "the folder's name must be a number"),
    ]
    assert source.problems == [
        ("alone", f"no masks in {sav_val / 'Annotations_6fps'}"),
        ("lost", f"no frames in {sav_val / 'JPEGImages_24fps'}"),
    ]


def other_size(root: Path) -> None:
    save(root / "Annotations/v/00001.png", np.ones((10, 8), np.uint8))


def coloured(root: Path) -> None:
    Image.new("RGB", SIZE[::-1], (255, 0, 0)).save(root / "Annotations/v/00001.png")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-25])


def mixed(root: Path) -> None:
    save(root / "Annotations/v/1/00001.png", ids())


def twice(root: Path) -> None:
    mixed(root)
    save(root / "Annotations/v/001/00001.png", ids())
    for path in (root / "Annotations/v").glob("*.png"):
        path.unlink()


def foreign(root: Path) -> None:
    for path in sorted((root / "Annotations/v").iterdir()):
        path.rename(path.with_stem(f"other_{path.stem}"))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(other_size, r"Annotations/v/00001\.png is 8 x 10 pixels, its image 10 x 8: with its sides swapped"),
     (coloured, r"Annotations/v/00001\.png: not a readable mask: it is coloured"),
     (lambda root: cut(root / "Annotations/v/00001.png"), r"Annotations/v/00001\.png: not a readable mask"),
     (mixed, "has folders of objects, such as 1, and a file beside them, 00000.png"),
     (twice, "has two folders for the same object"),
     (foreign, "has no mask of a frame in .*; v/other_00000.png: mask without frame"),
     (lambda root: frames(root / "JPEGImages/v", 1, "png"), "has two frames of the same name"),
     (lambda root: [path.unlink() for path in (root / "JPEGImages/v").iterdir()], "holds no frame"),
     (lambda root: (root / "JPEGImages/v/00000.jpg").write_bytes(b""), r"00000\.jpg is not a readable image")],
)  # fmt: skip
def test_unusable_videos_are_named(tmp_path: Path, spoil: Callable, reason: str) -> None:
    frames(tmp_path / "JPEGImages/v", 3)
    for number in range(3):
        save(tmp_path / f"Annotations/v/{number:05d}.png", ids((1, 0, 2, 0, 2)))
    spoil(tmp_path)
    with pytest.raises(BadVideo, match=f"^v: .*{reason}") as error:
        DavisSource(tmp_path).record("v")
    assert "\n" not in str(error.value)


def test_frames_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    frames(tmp_path / "JPEGImages/v", 4)
    save(tmp_path / "Annotations/v/00000.png", ids((1, 0, 2, 0, 2)))
    source = DavisSource(tmp_path)
    assert len(source.frames("v", [0, 1])) == 2
    (tmp_path / "JPEGImages/v/00001.jpg").write_bytes(b"no")
    save(tmp_path / "JPEGImages/v/00002.jpg", np.zeros((10, 8, 3), np.uint8))
    (tmp_path / "JPEGImages/v/00003.jpg").unlink()
    for number, reason in ((1, "not a readable image"), (2, "is 8 x 10 pixels, the first frame 10 x 8"),
                           (3, "not a readable image.*No such file")):  # fmt: skip
        with pytest.raises(BadVideo, match=rf"v: .*v/0000{number}\.jpg.*{reason}"):
            source.frames("v", [0, number])
    save(tmp_path / "Annotations/v/00000.png", ids()[:4])
    with pytest.raises(BadVideo, match="10 x 4 pixels"):
        source.masks("v", 0)


def test_a_root_without_the_folders(tmp_path: Path) -> None:
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(UserError, match="neither JPEGImages/ beside Annotations/ nor JPEGImages_24fps/ beside Ann"):
        DavisSource(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real DAVIS sample at {REAL}")
def test_a_real_video() -> None:
    source = DavisSource(REAL)
    assert source.keys == ["chair"] and source.problems == []
    record = source.record("chair")
    assert (record.size, record.frames, record.objects) == ((480, 720), 60, (1,))
    assert record.annotated == tuple(range(60)) and record.visible.all() and record.problems == ()
    assert source.record("chair") is record
    mask = np.asarray(Image.open(REAL / "Annotations/chair/frame_000023.png")) == 1
    assert np.array_equal(source.masks("chair", 23), mask[None])
    image = np.asarray(Image.open(REAL / "JPEGImages/chair/frame_000023.jpg").convert("RGB"))
    assert np.array_equal(source.frames("chair", [23])[0], image)
