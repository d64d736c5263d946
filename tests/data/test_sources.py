"""Decoding, splits and subsets."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samdistill.config import DataConfig
from samdistill.data import SOURCES, BadImage, Instance, open_source, split_keys, subset
from samdistill.types import UserError


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 5, y * 9, 255 - x * 5], -1).astype(np.uint8))


def folder_of(root: Path, count: int) -> Path:
    root.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / f"{i:03d}.png")
    return root


def config(root: Path, **changes: object) -> DataConfig:
    return DataConfig.model_validate({"kind": "folder", "root": root, **changes})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_damaged_files_raise_bad_image_or_decode(tmp_path: Path, suffix: str) -> None:
    out, rng = io.BytesIO(), random.Random(suffix)
    gradient(64, 64).save(out, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    whole = out.getvalue()
    source = SOURCES.get("folder")(folder_of(tmp_path, 1), None)
    path = tmp_path / "000.png"  # Pillow goes by content, not by name
    for _ in range(120):
        broken = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.5 else whole)
        for _ in range(rng.randrange(4)):
            if broken:
                broken[rng.randrange(min(len(broken), 400))] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            assert source.load("000.png").mode == "RGB"
        except BadImage as error:
            assert error.bad.key == "000.png" and "\n" not in str(error)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_names_key_and_file(tmp_path: Path, content: bytes) -> None:
    source = SOURCES.get("folder")(folder_of(tmp_path, 1), None)
    (tmp_path / "000.png").write_bytes(content)
    with pytest.raises(BadImage, match=r"000\.png: .*000\.png is not a readable image"):
        source.load("000.png")


def test_truncated_jpeg_and_vanished_file_raise(tmp_path: Path) -> None:
    gradient(200, 200).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-200])
    source = SOURCES.get("folder")(tmp_path, None)
    with pytest.raises(BadImage, match="truncated"):
        source.load("a.jpg")
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.load("a.jpg")


def test_bad_image_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(BadImage("a", "broken")))
    assert error.bad == ("a", "broken") and str(error) == "a: broken"


def test_subsets_are_nested_near_their_share_and_stable() -> None:
    keys = [f"sa_{i}" for i in range(20000)]
    one, five, ten = (set(subset(keys, f)) for f in (0.01, 0.05, 0.10))
    assert one < five < ten
    assert [len(s) / len(keys) for s in (one, five, ten)] == pytest.approx([0.01, 0.05, 0.10], abs=0.005)
    assert subset(list(reversed(keys)), 0.01) == sorted(one)
    assert subset(keys, 1.0) == sorted(keys)
    # other images never change whether one is chosen
    assert set(subset(keys[:10000], 0.05)) == five & set(keys[:10000])
    assert len(subset(["a", "b", "c"], 1e-9)) == 1 and subset([], 0.5) == []


def test_subset_choice_is_pinned_across_releases() -> None:
    """A store made by an earlier release must find its images again. The list was made with ``sha256sum``."""
    chosen = ["sa_112", "sa_136", "sa_195", "sa_204", "sa_245", "sa_71", "sa_99"]
    assert subset([f"sa_{i}" for i in range(400)], 0.01) == chosen


def test_split_and_subset_are_independent() -> None:
    keys = [f"{i}" for i in range(20000)]
    train, held_out = split_keys(keys, 0.1)
    assert set(train) | set(held_out) == set(keys) and not set(train) & set(held_out)
    assert len(subset(train, 0.05)) == pytest.approx(900, rel=0.15)  # the same salt would leave none


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_small_sets_have_both_sides(fraction: float) -> None:
    for count in range(2, 12):
        train, held_out = split_keys([str(i) for i in range(count)], fraction)
        assert train and held_out and len(train) + len(held_out) == count


def test_folder_is_divided_by_key(tmp_path: Path) -> None:
    folder_of(tmp_path, 60)
    train, held_out = (open_source(config(tmp_path, held_out_fraction=0.25), s).keys for s in ("train", "held_out"))
    assert sorted(train + held_out) == [f"{i:03d}.png" for i in range(60)]
    assert 5 <= len(held_out) <= 25
    thin = open_source(config(tmp_path, held_out_fraction=0.25, fraction=0.5), "train").keys
    assert set(thin) < set(train)
    assert open_source(config(tmp_path, held_out_fraction=0.25, fraction=0.5), "held_out").keys == held_out


def test_ids_choose_images(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 20)
    (tmp_path / "ids.txt").write_text("003.png\n\n007.png\n011.png\n003.png\n")
    data = config(tmp_path / "images", ids=tmp_path / "ids.txt", held_out_fraction=0.3)
    train, held_out = open_source(data, "train").keys, open_source(data, "held_out").keys
    assert sorted(train + held_out) == ["003.png", "007.png", "011.png"] and train and held_out
    data = config(tmp_path / "images", ids=tmp_path / "ids.txt", held_out_fraction=0)
    assert open_source(data, "train").keys == ["003.png", "007.png", "011.png"]


def test_unknown_ids_are_named(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 3)
    (tmp_path / "ids.txt").write_text("\n".join(["001.png", *(f"x{i}" for i in range(9))]))
    with pytest.raises(UserError, match=r"9 of 10 ids are not in the data set: x0, x1, x2, x3, x4, \.\.\.; keys look"):
        open_source(config(tmp_path / "images", ids=tmp_path / "ids.txt"), "train")
    with pytest.raises(UserError, match="cannot read"):
        open_source(config(tmp_path / "images", ids=tmp_path / "none.txt"), "train")


def test_user_errors_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder_of(tmp_path / "one", 1)
    cases = [
        (config(tmp_path / "nowhere"), "train", "is not a folder"),
        (config(tmp_path / "empty"), "train", "no image for data.kind=folder"),
        (config(tmp_path / "one", kind="fodler"), "train", "did you mean 'folder'"),
        (config(tmp_path / "one", held_out_fraction=0), "held_out", "leave none for held_out"),
        (config(tmp_path / "one", held_out_fraction=1), "train", "leave none for train"),
    ]
    for data, split, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            open_source(data, split)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", SOURCES.names())
def test_an_empty_root_is_a_user_error_for_every_kind(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        open_source(config(tmp_path, kind=kind), "train")


def test_the_last_keys_are_held_out(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 12)
    names = [f"{i:03d}.png" for i in range(12)]

    def keys(**changes: object) -> tuple[list[str], list[str]]:
        data = config(tmp_path / "images", held_out_last=3, **changes)
        return open_source(data, "train").keys, open_source(data, "held_out").keys

    assert keys() == keys(held_out_fraction=0.5) == keys(held_out=None) == (names[:9], names[9:])
    thin, held_out = keys(fraction=0.5)
    assert thin == subset(names[:9], 0.5) and held_out == names[9:]
    (tmp_path / "ids.txt").write_text("\n".join(reversed(names[2:8])))
    assert keys(ids=tmp_path / "ids.txt") == (names[2:5], names[5:8])
    for split in ("train", "held_out"):
        with pytest.raises(UserError, match="held_out_last=12 of 12 images leaves none to train on"):
            open_source(config(tmp_path / "images", held_out_last=12), split)  # type: ignore[arg-type]


def test_the_last_keys_of_a_divided_root_come_from_its_training_split(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 4)):
        for kind, suffix in (("images", "jpg"), ("annotations", "json")):
            (tmp_path / kind / split).mkdir(parents=True)
            for i in range(count):
                (tmp_path / kind / split / f"{split}{i}.{suffix}").touch()
    for held_out in ("val", "train", None):
        data = config(tmp_path, kind="sa1b", held_out=held_out, held_out_last=2)
        assert open_source(data, "train").keys == ["train0", "train1", "train2"]
        assert open_source(data, "held_out").keys == ["train3", "train4"]


def test_boxes_come_from_masks_unless_a_source_knows_better(tmp_path: Path) -> None:
    first, crowd, empty = (np.zeros((8, 8), bool) for _ in range(3))
    first[2:5, 3] = True
    crowd[:] = True

    class Masks(SOURCES.get("folder")):  # type: ignore[misc]
        labelled = True

        def read_instances(self, key: str) -> list[Instance]:
            return [Instance(first, "a", 1), Instance(crowd, "b", 2, crowd=True), Instance(empty, "c", 3)]

    source = Masks(folder_of(tmp_path, 1), None)
    assert source.boxes("000.png").tolist() == [[3, 2, 4, 5], [0, 0, 0, 0]]
    plain = SOURCES.get("folder")(tmp_path, None)
    assert plain.boxes("000.png").shape == (0, 4) and plain.boxes("000.png").dtype == np.float32
    assert plain.phrases("000.png") == plain.vocabulary == []
