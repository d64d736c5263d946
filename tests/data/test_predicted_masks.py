"""Folders of predicted masks beside folders of true ones: what is read, what counts, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samdistill.data.predicted_masks import find_videos, object_masks
from samdistill.metrics.video_frames import DAVIS_2017, SAV, VideoConvention
from samdistill.types import UserError

SIZE = (6, 12)


def grid(*stripes: int) -> np.ndarray:
    """A map of ids in vertical stripes."""
    return np.tile(np.repeat(np.array(stripes, np.uint8), SIZE[1] // len(stripes)), (SIZE[0], 1))


def write(folder: Path, grids: Sequence[np.ndarray | None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, values in enumerate(grids):
        if values is not None:
            Image.fromarray(values).save(folder / f"{number:05}.png")


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """Ids 1 and 3 in the first frame, 2 and 4 later; a border of 255. Predictions of the two inner frames alone."""
    truth = [grid(0, 1, 255, 3), grid(2, 1, 255, 3), grid(2, 1, 4, 0), grid(0, 0, 0, 0)]
    write(tmp_path / "truth/Annotations/480p/bear", truth)
    write(tmp_path / "found/bear", [None, grid(0, 1, 0, 3), grid(1, 1, 0, 3), None])
    return tmp_path


def read(root: Path, convention: VideoConvention) -> dict[int, tuple[list[list[int]], list[list[int]]]]:
    """By object, the stripes (one pixel of each) of truth and prediction in every frame."""
    (video,), _ = find_videos(root / "found", root / "truth")
    columns = np.s_[:, 0, :: SIZE[1] // 4]
    found = {one.object_id: one for one in object_masks(video, convention)}
    return {
        k: (m.truth[columns].astype(int).tolist(), m.predicted[columns].astype(int).tolist()) for k, m in found.items()
    }


def test_ids_by_the_rules_of_davis(davis: Path) -> None:
    found = read(davis, DAVIS_2017)
    none = [0, 0, 0, 0]
    assert list(found) == [1, 2, 3]  # up to the greatest of the first frame: 4 comes later, 255 is a border
    assert found[1] == ([[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], none], [none, [0, 1, 0, 0], [1, 1, 0, 0], none])
    assert found[2] == ([none, [1, 0, 0, 0], [1, 0, 0, 0], none], [none] * 4)
    assert found[3][1] == [none, [0, 0, 0, 1], [0, 0, 0, 1], none]


def test_ids_by_the_rules_of_sav(davis: Path) -> None:
    found = read(davis, SAV)
    assert list(found) == [1, 2, 3, 4, 255]  # whatever a frame that counts shows, 255 too
    assert found[4][0] == [[0] * 4, [0] * 4, [0, 0, 1, 0], [0] * 4] and not np.any(found[4][1])


def test_a_folder_per_object(tmp_path: Path) -> None:
    for number, frames in (("000", 4), ("002", 3)):
        write(tmp_path / "truth/v" / number, [grid(0, 255, 0, 0)] * frames)
        write(tmp_path / "found/v" / number, [None, *[grid(0, 1, 1, 0)] * (frames - 2)])
    found = read(tmp_path, SAV)
    assert [(number, len(truth)) for number, (truth, _) in found.items()] == [(0, 4), (2, 3)]
    assert found[2] == ([[0, 1, 0, 0]] * 3, [[0] * 4, [0, 1, 1, 0], [0] * 4])
    with pytest.raises(UserError, match=r"a folder per object, and davis_2017 takes PNGs.*give --convention sav"):
        read(tmp_path, DAVIS_2017)


def test_where_masks_are_found_and_which_videos_count(davis: Path) -> None:
    for name in ("camel", "dog"):
        write(davis / f"truth/Annotations/480p/{name}", [grid(1)] * 3)
        write(davis / f"found/{name}", [grid(1)] * 3)
    write(davis / "found/extra", [grid(1)] * 3)
    for place in ("truth", "truth/Annotations/480p"):
        videos, extra = find_videos(davis / "found", davis / place)
        assert [v.name for v in videos] == ["bear", "camel", "dog"] and extra == ["extra"]
    listing = davis / "truth/ImageSets/2017/val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("dog\nbear\n")
    videos, extra = find_videos(davis / "found", davis / "truth")
    assert [v.name for v in videos] == ["bear", "dog"] and extra == ["extra"]
    assert [v.truth.name for v in videos] == [v.predicted.name for v in videos] == ["bear", "dog"]


def _remove(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def _put(path: str, image: Image.Image) -> Callable[[Path], None]:
    return lambda root: image.save(root / path)


FAULTS = {
    "no results": (lambda root: (root / "found").rename(root / "moved"), r"found: no such folder of predicted masks"),
    "no truth": (lambda root: (root / "truth").rename(root / "moved"), r"truth: no such folder of masks"),
    "no video": (
        lambda root: (root / "found/bear").rename(root / "found/cat"),
        r"found: 1 of 1 videos have no predictions, such as bear/",
    ),
    "no video at all": (
        lambda root: (root / "truth/Annotations/480p/bear").rename(root / "moved"), r"480p: holds no folder of a video",
    ),
    "no frame": (_remove("found/bear/00002.png"), r"found/bear/00002.png: missing; 1 of 2 scored frames"),
    "another size": (
        _put("found/bear/00001.png", Image.new("L", (6, 12))),
        r"found/bear/00001.png is 6 x 12 pixels, the first true mask of its video 12 x 6",
    ),
    "another size of the truth": (
        _put("truth/Annotations/480p/bear/00003.png", Image.new("L", (6, 12))),
        r"480p/bear/00003.png is 6 x 12 pixels",
    ),
    "colours": (
        _put("found/bear/00001.png", Image.new("RGB", (12, 6), (1, 2, 3))),
        r"found/bear/00001.png: not a readable mask: it is coloured; a mask is a palette or grey PNG",
    ),
    "another format": (
        lambda root: Image.new("L", (12, 6)).save(root / "found/bear/00001.png", format="JPEG"),
        r"found/bear/00001.png: not a readable mask: it is a JPEG file, not a PNG",
    ),
    "torn": (
        lambda root: (root / "found/bear/00001.png").write_bytes(b"\x89PNG\r\n"),
        r"found/bear/00001.png: not a readable mask",
    ),
    "an id that nothing has": (
        _put("found/bear/00001.png", Image.fromarray(grid(0, 1, 4, 3))),
        r"found/bear: holds the id 4, and the first true mask has ids up to 3",
    ),
    "void": (_put("found/bear/00001.png", Image.fromarray(grid(0, 1, 255, 3))), r"holds the id 255.*leave 255 out"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_in_one_line(davis: Path, fault: str) -> None:
    change, said = FAULTS[fault]
    change(davis)
    with pytest.raises(UserError, match=said) as caught:
        read(davis, DAVIS_2017)
    assert "\n" not in str(caught.value)


def test_faults_of_folders_per_object(tmp_path: Path) -> None:
    write(tmp_path / "truth/v/000", [grid(0, 1)] * 3)
    write(tmp_path / "found/v/000", [None, grid(0, 1, 2)])
    with pytest.raises(UserError, match=r"000/00001.png: holds 3 values; in a folder per object a mask has two"):
        read(tmp_path, SAV)
    (tmp_path / "found/v/000").rename(tmp_path / "found/v/001")
    with pytest.raises(UserError, match=r"found/v/000/00001.png: missing; 1 of 1 scored frames have no prediction"):
        read(tmp_path, SAV)
    (tmp_path / "truth/v/000").rename(tmp_path / "truth/v/cat")
    with pytest.raises(UserError, match=r"truth/v/cat: the name of an object's folder is its number, such as 000"):
        read(tmp_path, SAV)
    (tmp_path / "truth/v/cat").rename(tmp_path / "truth/v/001")
    for path in (tmp_path / "truth/v/001").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"truth/v/001: holds no PNG of a true mask"):
        read(tmp_path, SAV)
