"""Folders of frames: their order, what is missing between them, and what is not read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from samdistill.data.frames import list_frames, natural
from samdistill.types import UserError


def folder_of(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).write_bytes(b"")
    return root


def test_frames_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(1, 31)]
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(names) != names  # what an alphabet makes of them
    assert list_frames(folder_of(tmp_path, *shuffled), "v") == (tuple(names), ())


def test_padded_numbers_and_numbers_inside_names(tmp_path: Path) -> None:
    names = ["cam2_f8.png", "cam2_f009.png", "cam2_f10.png", "cam10_f1.png"]
    assert list_frames(folder_of(tmp_path, *reversed(names)), "v").names == tuple(names)
    assert sorted(["a", "10", "b9", "2", "b10"], key=natural) == ["2", "10", "a", "b9", "b10"]


@pytest.mark.parametrize(
    ("numbers", "hole"),
    [
        (range(5), None), (range(7, 40), None), (range(0, 60, 5), None), ([3], None),
        ([0, 1, 2, 6, 7], ("v, frame after 00002.jpg", "3 in all")),
        ([0, 5, 10, 25, 30, 45], ("v, frame after 00010.jpg", "4 in all")),
    ],
)  # fmt: skip
def test_holes_in_the_numbering_are_named(tmp_path: Path, numbers, hole) -> None:
    problems = list_frames(folder_of(tmp_path, *(f"{number:05d}.jpg" for number in numbers)), "v").problems
    assert [problem.key for problem in problems] == ([] if hole is None else [hole[0]])
    assert hole is None or hole[1] in problems[0].reason


def test_names_without_numbers_have_no_holes(tmp_path: Path) -> None:
    assert list_frames(folder_of(tmp_path, "a.jpg", "b.jpg", "9.jpg"), "v") == (("9.jpg", "a.jpg", "b.jpg"), ())


@pytest.mark.parametrize("names", [("1.jpg", "01.jpg"), ("1.jpg", "1.png")])
def test_two_frames_of_one_number_are_refused(tmp_path: Path, names) -> None:
    with pytest.raises(UserError, match="has two frames of the same name or number"):
        list_frames(folder_of(tmp_path, *names), "v")


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    folder_of(tmp_path, "1.cr2", "2.cr2", "notes.txt", ".3.jpg")
    with pytest.raises(UserError, match=r"holds no frame; v/1\.cr2: \.cr2 files are not read"):
        list_frames(tmp_path, "v")
    assert [problem.key for problem in list_frames(folder_of(tmp_path, "4.jpg"), "v").problems] == [
        "v/1.cr2",
        "v/2.cr2",
    ]
