"""SA-V: masks, ids, concepts and frames of whole videos, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from samdistill.data.sav import SavSource, annotated_frames, read_masklets
from samdistill.data.skipped import BadInput
from samdistill.data.videos import BadVideo
from samdistill.types import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
REAL = SHARED / "sav"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real SA-V sample at {REAL}")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(path.read_bytes())
    change(record)
    path.write_text(json.dumps(record))


def test_a_video_and_its_masks(tmp_path: Path, write_sav: Callable, number_of: Callable) -> None:
    masks = write_sav(tmp_path, "sav_000007", 60, objects=3, hidden=[2, 14])
    source = SavSource(tmp_path)
    record = source.record("sav_000007")
    assert source.keys == ["sav_000007"] and source.problems == []
    assert source.path("sav_000007") == tmp_path / "sav_000007.mp4"
    assert (record.key, record.size, record.frames, record.rate) == ("sav_000007", (64, 96), 60, 24.0)
    assert record.annotated == tuple(range(0, 60, 4)) and record.objects == (0, 1, 2)
    assert record.concepts == () and record.problems == () and record.labelled.all()
    assert np.array_equal(record.visible, [m.any((1, 2)) for m in masks.values()])
    assert not record.visible[[2, 14]].any() and record.row(16) == 4
    for index, expected in masks.items():
        found = source.masks("sav_000007", index)
        assert found.dtype == bool and np.array_equal(found, expected)
    with pytest.raises(ValueError, match="frame 5 of sav_000007 is not annotated"):
        source.masks("sav_000007", 5)
    frames = source.frames("sav_000007", [31, 4, 59, 4])
    assert frames.shape == (4, 64, 96, 3) and frames.dtype == np.uint8
    assert [number_of(frame) for frame in frames] == [31, 4, 59, 4]
    assert source.frames("sav_000007", []).shape == (0, 64, 96, 3)
    with pytest.raises(IndexError, match="frame 60 of sav_000007, which has 60"):
        source.frames("sav_000007", [0, 60])


def test_objects_by_hand_come_before_the_automatic_ones(tmp_path: Path, write_sav: Callable) -> None:
    path = tmp_path / "sav_1_manual.json"
    write_sav(tmp_path, "sav_1", objects=2, never=[1])
    path.rename(tmp_path / "sav_1_auto.json")
    assert SavSource(tmp_path).record("sav_1").objects == (0,)
    masks = write_sav(tmp_path, "sav_1", objects=3, hidden=[0])
    edit(path, lambda r: r.update(masklet_id=[4, 0, 9], masklet_concepts=[["red box"], [], ["box", "lid"]]))
    record = (source := SavSource(tmp_path)).record("sav_1")
    assert record.objects == (4, 0, 9, 10) and record.concepts == (("red box",), (), ("box", "lid"), ())
    assert record.problems == (BadInput("sav_1, object 11", "it appears in no annotated frame"),)
    found = source.masks("sav_1", 8)
    assert np.array_equal(found[:3], masks[8]) and np.array_equal(found[3], masks[8][0])
    assert record.visible[0].tolist() == [False, False, False, True]


def test_an_object_that_never_appears_is_left_out_and_named(tmp_path: Path, write_sav: Callable) -> None:
    masks = write_sav(tmp_path, "sav_1", objects=3, never=[1], concepts=[["a"], ["b"], ["c", "d"]])
    record = (source := SavSource(tmp_path)).record("sav_1")
    assert record.objects == (0, 2) and record.concepts == (("a",), ("c", "d")) and record.visible.shape == (15, 2)
    assert record.problems == (BadInput("sav_1, object 1", "it appears in no annotated frame"),)
    assert np.array_equal(source.masks("sav_1", 4), masks[4][[0, 2]])
    edit(tmp_path / "sav_1_manual.json", lambda r: r.update(masklet=[[]] * 15, masklet_id=[], masklet_concepts=[]))
    assert source.record("sav_1") is record  # parsed once; another source reads anew
    record = (source := SavSource(tmp_path)).record("sav_1")  # a video without objects is one all the same
    assert record.objects == () and record.visible.shape == (15, 0)
    assert source.masks("sav_1", 4).shape == (0, 64, 96)


def test_run_lengths_as_a_list_of_floats(tmp_path: Path, write_sav: Callable) -> None:
    masks = write_sav(tmp_path, "sav_1", objects=1, hidden=[3])

    def spell_out(record: dict[str, Any]) -> None:
        for row, mask in zip(record["masklet"], masks.values(), strict=True):
            pixels = np.concatenate([[0], mask[0].T.ravel(), [2]])
            changes = np.flatnonzero(np.diff(pixels))
            row[0]["counts"] = np.diff(np.concatenate([[0], changes])).astype(float).tolist()

    edit(tmp_path / "sav_1_manual.json", spell_out)
    source = SavSource(tmp_path)
    assert source.record("sav_1").visible[:, 0].tolist() == [row != 3 for row in range(15)]
    assert all(np.array_equal(source.masks("sav_1", index), mask) for index, mask in masks.items())


def test_listing_finds_sub_folders_and_names_what_is_alone(tmp_path: Path, write_sav: Callable) -> None:
    for name in ("b/sav_2.mp4", "b/sav_2_auto.json", "a/deep/sav_1.mp4", "a/deep/sav_1_manual.json", "a/sav_3.mp4",
                 "c/sav_2.mp4", "c/sav_4_manual.json", "c/notes.json", "c/._sav_2.mp4", "a/sav_3.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    source = SavSource(tmp_path)
    assert source.keys == ["sav_1", "sav_2"] and source.path("sav_2") == tmp_path / "b/sav_2.mp4"
    assert source.problems == [
        ("sav_2", f"{tmp_path}/c/sav_2.mp4 has the same name as {tmp_path}/b/sav_2.mp4"),
        ("sav_3", f"{tmp_path}/a/sav_3.mp4 has no sav_3_manual.json or sav_3_auto.json beside it"),
        ("sav_4_manual", f"{tmp_path}/c/sav_4_manual.json has no video sav_4.mp4 beside it"),
    ]


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 8, 24])
def test_the_stride_comes_from_the_counts(stride: int) -> None:
    for frames in (60, 97, 483, 700):
        expected = tuple(range(0, frames, stride))
        others = [s for s in range(1, frames + 1) if len(range(0, frames, s)) == len(expected)]
        if others == [stride] or (stride == 4 and 4 in others):
            assert annotated_frames(frames, len(expected)) == expected
        elif 4 not in others:
            with pytest.raises(ValueError, match=f"may be every {others[0]}th or every {others[-1]}th"):
                annotated_frames(frames, len(expected))


def test_strides_that_cannot_be() -> None:
    assert annotated_frames(483, 121)[-1] == 480 and annotated_frames(9, 1) == (0,)
    assert annotated_frames(9, 3) == (0, 4, 8)  # every third would do as well; SA-V's is the fourth
    for frames, count, reason in ((60, 40, "no regular stride"), (5, 6, "6 annotated frames for a video of 5"),
                                  (5, 0, "0 annotated frames"), (20, 2, "every 10th or every 19th")):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            annotated_frames(frames, count)


def test_a_stride_of_another_number(tmp_path: Path, write_sav: Callable) -> None:
    masks = write_sav(tmp_path, "sav_1", 30, stride=3)
    source = SavSource(tmp_path)
    assert source.record("sav_1").annotated == tuple(range(0, 30, 3))
    assert np.array_equal(source.masks("sav_1", 27), masks[27])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def first_rle(record: dict[str, Any]) -> dict[str, Any]:
    return record["masklet"][2][1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [(lambda r: r.update(video_id="sav_2"), "belongs to another video, sav_2"),
     (lambda r: r.update(video_frame_count=61.0), r"is for 61 frames, sav_1\.mp4 has 60"),
     (lambda r: r.update(masklet=r["masklet"][:-1] * 3), ": 42 annotated frames lie at no regular stride"),
     (lambda r: r.update(masklet=[]), ": 0 annotated frames"),
     (lambda r: r.update(video_height=96.0, video_width=64.0), "object 0 in annotated frame 0 is 96 x 64 pixels, "
                                                               "the video 64 x 96"),
     (lambda r: first_rle(r).update(size=[32, 48]), "object 1 in annotated frame 2 is 48 x 32 pixels, the video 96 x"),
     (lambda r: first_rle(r).update(counts="ka0e8k"), "object 1 in annotated frame 2: its run lengths are damaged"),
     (lambda r: first_rle(r).update(counts=""), "its run lengths are damaged"),
     (lambda r: first_rle(r).update(counts=None), "its run lengths are damaged"),
     (lambda r: r["masklet"][2].__setitem__(1, None), "object 1 in annotated frame 2 is not a run-length mask"),
     (lambda r: r["masklet"][2].pop(), "annotated frame 2 needs one mask for each of 2 objects"),
     (lambda r: r.update(masklet_id=[3, 3]), "two objects have the same id"),
     (lambda r: r.pop("masklet_id"), "it has no 'masklet_id'"),
     (lambda r: r.update(video_frame_count=60.5), "video_frame_count is 60.5, not a positive whole number"),
     (lambda r: r.update(video_height=None), "video_height is None"),
     (lambda r: r.update(masklet_concepts=[["a"]]), "1 lists of concepts for 2 objects"),
     (lambda r: r.update(masklet_concepts=["ab", "c"]), "needs one list of texts for each object"),
     (lambda r: r.update(masklet=5), "not iterable")],
)  # fmt: skip
def test_annotations_that_do_not_fit_are_named(
    tmp_path: Path, write_sav: Callable, change: Callable, reason: str
) -> None:
    write_sav(tmp_path, "sav_1")
    edit(tmp_path / "sav_1_manual.json", change)
    with pytest.raises(BadVideo, match=rf"^sav_1: .*sav_1_manual\.json.*{reason}") as error:
        SavSource(tmp_path).record("sav_1")
    assert "\n" not in str(error.value) and error.value.bad.key == "sav_1"


def test_the_wrong_size_of_everything(tmp_path: Path, write_sav: Callable, write_video: Callable) -> None:
    write_sav(tmp_path, "sav_1")
    write_video(tmp_path / "sav_1.mp4", 60, (96, 96))
    with pytest.raises(BadVideo, match=r"_manual\.json is 96 x 64 pixels, sav_1\.mp4 96 x 96"):
        SavSource(tmp_path).record("sav_1")


def test_two_annotations_that_disagree(tmp_path: Path, write_sav: Callable) -> None:
    write_sav(tmp_path, "sav_1", stride=3)
    (tmp_path / "sav_1_manual.json").rename(tmp_path / "sav_1_auto.json")
    write_sav(tmp_path, "sav_1")
    with pytest.raises(BadVideo, match=r"sav_1_auto\.json has 20 annotated frames, sav_1_manual\.json 15"):
        SavSource(tmp_path).record("sav_1")


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [("sav_1.mp4", cut, "sav_1.mp4 is not a readable video: its data ends early"),
     ("sav_1.mp4", Path.unlink, "sav_1.mp4 is not a readable video: No such file"),
     ("sav_1_manual.json", cut, "sav_1_manual.json is not a readable SA-V annotation"),
     ("sav_1_manual.json", Path.unlink, "sav_1_manual.json is not a readable SA-V annotation: .*No such file"),
     ("sav_1_manual.json", lambda path: path.write_text("[]"), "not a readable SA-V annotation"),
     ("sav_1_manual.json", lambda path: path.write_bytes(b"\xff"), "not a readable SA-V annotation")],
)  # fmt: skip
def test_files_that_cannot_be_read(
    tmp_path: Path, write_sav: Callable, name: str, spoil: Callable, reason: str
) -> None:
    write_sav(tmp_path, "sav_1")
    source = SavSource(tmp_path)
    spoil(tmp_path / name)
    for _ in range(2):  # not remembered as good
        with pytest.raises(BadVideo, match=f"^sav_1: .*{reason}"):
            source.record("sav_1")


def test_run_lengths_that_do_not_fill_the_frame(tmp_path: Path, write_sav: Callable) -> None:
    write_sav(tmp_path, "sav_1")
    small = coco_mask.encode(np.ones((32, 48), np.uint8, order="F"))["counts"].decode()
    edit(tmp_path / "sav_1_manual.json", lambda r: first_rle(r).update(counts=small))
    source = SavSource(tmp_path)
    assert source.masks("sav_1", 4).any()
    with pytest.raises(BadVideo, match=r"sav_1_manual\.json: object 1 in annotated frame 2: run lengths sum to 1536"):
        source.masks("sav_1", 8)


def test_a_frame_that_cannot_be_decoded(tmp_path: Path, write_sav: Callable) -> None:
    write_sav(tmp_path, "sav_1")
    data = bytearray((tmp_path / "sav_1.mp4").read_bytes())
    data[-400:-40] = bytes(360)
    (tmp_path / "sav_1.mp4").write_bytes(data)
    source = SavSource(tmp_path)
    assert len(source.frames("sav_1", [0, 20])) == 2
    with pytest.raises(BadVideo, match=r"^sav_1: .*sav_1\.mp4 .* frame \d+ or one that it depends on is damaged"):
        source.frames("sav_1", [0, 59])


def test_sources_travel_to_other_processes(tmp_path: Path, write_sav: Callable) -> None:
    write_sav(tmp_path, "sav_1")
    source = SavSource(tmp_path)
    source.record("sav_1")
    data = pickle.dumps(source)
    assert len(data) < 2000 and pickle.loads(data).record("sav_1").objects == (0, 1)


@needs_real
@pytest.mark.parametrize(("kind", "objects", "empty"), [("manual", 5, 125), ("auto", 9, None)])
def test_real_annotations_are_read_whole(kind: str, objects: int, empty: int | None) -> None:
    path = REAL / f"sav_000001_{kind}.json"
    masklets, record = read_masklets(path), json.loads(path.read_bytes())
    assert masklets.video == "sav_000001" and masklets.frames == 483 and masklets.size == (848, 480)
    assert masklets.ids == tuple(range(objects)) and masklets.concepts == ()
    assert annotated_frames(483, len(masklets.rles)) == tuple(range(0, 483, 4))
    areas = np.array([[coco_mask.area(rle) for rle in row] for row in record["masklet"]])
    assert areas.shape == (121, objects) and np.array_equal(masklets.visible, areas > 0)
    assert empty is None or (areas == 0).sum() == empty
    for row in range(0, 121, 24):
        for column in range(objects):
            expected = coco_mask.decode(record["masklet"][row][column])
            assert np.array_equal(masklets.mask(row, column), expected.astype(bool))
    listed = np.array(record["masklet_size_abs"])
    assert np.allclose([areas[:, k][areas[:, k] > 0].mean() for k in range(objects)], listed, rtol=0.02)


@needs_real
def test_a_real_video_agrees_with_its_own_frames_as_files() -> None:
    """The same video lies there as JPEGs and PNGs, so neither this package nor PyAV says what frame 23 is."""
    source = SavSource(REAL)
    assert source.keys == ["sav_900010"] and len(source.problems) == 2
    record = source.record("sav_900010")
    assert (record.size, record.frames, record.rate, record.objects) == ((480, 720), 60, 30.0, (0,))
    assert record.annotated == tuple(range(0, 60, 4)) and record.visible.all()
    folder = SHARED / "davis" / "JPEGImages" / "chair"
    files = [np.asarray(Image.open(path).convert("L").reduce(8), int) for path in sorted(folder.iterdir())]
    for number, frame in enumerate(source.frames("sav_900010", range(60))):
        grey = np.asarray(Image.fromarray(frame).convert("L").reduce(8), int)
        far = [np.abs(grey - file).mean() for file in files]
        assert far[number] == min(far) < 1.5 and sum(d == far[number] for d in far) <= 2  # every sixth is a repeat
    for index in (0, 24, 56):
        ids = np.asarray(Image.open(SHARED / "davis" / "Annotations" / "chair" / f"frame_{index:06d}.png"))
        assert np.array_equal(source.masks("sav_900010", index)[0], ids == 1)


def test_unknown_run_lengths_name_the_object(tmp_path: Path, write_sav: Callable) -> None:
    write_sav(tmp_path, "sav_1")
    edit(tmp_path / "sav_1_manual.json", lambda r: first_rle(r).update(counts=[64.0 * 96 + 1, -1.0]))
    masklets = read_masklets(tmp_path / "sav_1_manual.json")
    with pytest.raises(UserError, match="object 1 in annotated frame 2: run lengths sum to 6144"):
        masklets.mask(2, 1)
