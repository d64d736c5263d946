"""A folder of images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from samdistill.data import FolderSource


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path)


def test_every_depth_and_extension_but_nothing_hidden(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/c.JPEG", "a/b/d.png", "a/b/e.tiff", "z.webp"):
        save(tmp_path / name)
    for name in (".hidden.png", ".cache/x.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    source = FolderSource(tmp_path)
    assert source.keys == ["a/b/d.png", "a/b/e.tiff", "a/c.JPEG", "b.jpg", "z.webp"]
    assert source.problems == [] and not source.labelled and source.instances("b.jpg") == []
    assert source.load("a/b/d.png").size == (4, 3)


def test_same_stem_with_two_suffixes_gives_two_keys(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    save(tmp_path / "a.png")
    assert FolderSource(tmp_path).keys == ["a.jpg", "a.png"]


def test_a_link_that_goes_round_ends(tmp_path: Path) -> None:
    save(tmp_path / "a/b.png")
    (tmp_path / "a/loop").symlink_to(tmp_path, target_is_directory=True)
    assert FolderSource(tmp_path).keys == ["a/b.png"]


def test_a_folder_is_listed_once_and_under_its_own_path(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("b/c/x.png", "m/y.png"):
        save(root / name)
    save(tmp_path / "outside/deep/z.png")
    for link, target in {
        "a": root / "b", "b/again": root / "m", "k": root / "b/c", "z": root / "m",  # inside, before and after it
        "o1": tmp_path / "outside", "o2": tmp_path / "outside", "o0": tmp_path / "outside/deep",
        "up": tmp_path, "gone": tmp_path / "nowhere",
    }.items():  # fmt: skip
        (root / link).symlink_to(target, target_is_directory=True)
    source = FolderSource(root)
    assert source.keys == ["b/c/x.png", "m/y.png", "o0/z.png"] and source.problems == []


@pytest.mark.skipif(os.name == "nt", reason="such names cannot exist on Windows")
def test_names_that_cannot_be_keys_are_reported(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "good.png").rename(tmp_path / "two\nlines.png")
    save(tmp_path / "good.png")
    source = FolderSource(tmp_path)
    assert source.keys == ["good.png"]
    assert [(p.key, p.reason) for p in source.problems] == [
        ("'two\\nlines.png'", "its name holds a line break or another control character")
    ]
