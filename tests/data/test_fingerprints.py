"""What tells that a source file changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samdistill.data import CocoSource, FolderSource, MaskFolderSource, Sa1bSource, SavSource
from samdistill.data.fingerprints import file_digest, fingerprints


def test_size_head_and_tail_are_told_apart_and_copies_are_not(tmp_path: Path) -> None:
    piece, content = 64, bytearray(range(200))
    path = tmp_path / "a"
    path.write_bytes(content)
    first = file_digest(path, piece)
    copy = Path(shutil.copy(path, tmp_path / "elsewhere"))
    os.utime(copy, (1, 1))
    assert file_digest(copy, piece) == first
    seen = {first}
    for change in (0, 63, 136, 199):  # the head, and the tail
        other = bytearray(content)
        other[change] ^= 1
        path.write_bytes(other)
        seen.add(file_digest(path, piece))
    path.write_bytes(content + b"\0")
    seen.add(file_digest(path, piece))
    path.write_bytes(b"")
    seen.add(file_digest(path, piece))
    assert len(seen) == 7
    for size in (63, 64, 65, 127, 128, 129):  # every byte of a small file counts
        small = os.urandom(size)
        path.write_bytes(small)
        told = file_digest(path, piece)
        for at in range(0, min(size, 128), 31):
            path.write_bytes(small[:at] + bytes([small[at] ^ 1]) + small[at + 1 :])
            assert file_digest(path, piece) != told


def test_images_that_change_names_are_noticed(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.bmp")
    source = FolderSource(tmp_path)
    before = fingerprints(source.fingerprint, source.keys)
    for number in range(3):
        (tmp_path / f"{number}.bmp").rename(tmp_path / f"old{number}")
    for number in range(3):
        (tmp_path / f"old{number}").rename(tmp_path / f"{(number + 1) % 3}.bmp")
    after = fingerprints(source.fingerprint, source.keys)
    assert after.keys() == before.keys() and all(after[key] != before[key] for key in after)
    assert sorted(after.values()) == sorted(before.values())
    (tmp_path / "1.bmp").unlink()
    assert fingerprints(source.fingerprint, source.keys)["1.bmp"] == ""


@pytest.mark.parametrize("kind", ["coco", "masks", "sa1b"])
def test_labels_are_told_apart_from_the_image(tmp_path: Path, kind: str) -> None:
    outline = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 3],
               "segmentation": {"size": [8, 8], "counts": [0, 64]}}  # fmt: skip
    folder = tmp_path if kind == "sa1b" else tmp_path / "images"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    (tmp_path / "masks").mkdir()

    def annotate(counts: list[int], value: int) -> None:
        outline["segmentation"]["counts"] = counts  # type: ignore[index]
        if kind == "coco":
            entry = {"id": 1, "file_name": "a.jpg", "height": 8, "width": 8}
            content = {"images": [entry], "categories": [{"id": 1, "name": "cat"}], "annotations": [outline]}
            (tmp_path / "instances.json").write_text(json.dumps(content))
        elif kind == "masks":
            Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / "masks/a.png")
        else:
            content = {"image": {"height": 8, "width": 8}, "annotations": [outline]}
            (tmp_path / "a.json").write_text(json.dumps(content))

    def told() -> tuple[str, str]:
        source = {"coco": CocoSource, "masks": MaskFolderSource, "sa1b": Sa1bSource}[kind](tmp_path, None)
        return source.fingerprint("a"), source.fingerprint("a", labels=True)

    annotate([0, 64], 1)
    image, both = told()
    annotate([1, 63], 2)
    assert told()[0] == image and told()[1] != both
    annotate([0, 64], 1)
    assert told() == (image, both)
    Image.new("RGB", (8, 8), "red").save(folder / "a.jpg")
    assert told()[0] != image and told()[1] != both


def test_a_video_is_its_file_or_all_of_its_frames(tmp_path: Path, write_sav) -> None:
    write_sav(tmp_path, "v", 8)
    source = SavSource(tmp_path)
    before = source.fingerprint("v")
    (tmp_path / "v.mp4").write_bytes((tmp_path / "v.mp4").read_bytes()[:-1] + b"x")
    assert source.fingerprint("v") != before
    from samdistill.data import DavisSource

    for folder in ("JPEGImages/v", "Annotations/v"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / folder / f"{number}.png")
    frames = DavisSource(tmp_path)
    before = frames.fingerprint("v")
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / "Annotations/v/1.png")
    assert frames.fingerprint("v") == before  # maps of frames know nothing of masks
    (tmp_path / "JPEGImages/v/0.png").rename(tmp_path / "JPEGImages/v/3.png")
    assert frames.fingerprint("v") != before
