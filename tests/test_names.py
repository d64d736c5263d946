"""Keys and the files that are written about them."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samdistill.errors import UserError
from samdistill.names import file_name, key_problem

PARTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=300)
KEYS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
COMMON = st.sampled_from(
    ["a", "A", "%", "%61", "a%", "a/b", "a%/b", ".a", "a.", "CON", "con.txt", "com1", "x" * 250, "ü" * 120]
)


@pytest.mark.parametrize("key", ["sa_1", "sub/DSC 01.jpg", "b.c", "größe", "100%", "CON", "ab:c", ".hidden", "x" * 255])
def test_a_name_inside_the_folder_is_a_key(key: str) -> None:
    assert key_problem(key) is None


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("/etc/passwd", "absolute"), ("C:/x", "absolute"), ("../a", r"'\.\.'"), ("a/../../b", r"'\.\.'"),
        ("a/./b", r"'\.'"), ("", "empty"), ("a//b", "empty"), ("a/", "empty"), ("a\\b", "backslash"),
        ("a\0b", "control"), ("a\nb", "line break"), ("\ud800", "UTF-8"), ("x" * 256, "255 bytes"),
        ("ü" * 128, "255 bytes"),
    ],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_is_none(key: str, reason: str) -> None:
    assert re.search(reason, key_problem(key) or "")
    with pytest.raises(UserError, match=reason):
        file_name(key)


def test_usual_names_stay_as_they_are() -> None:
    for key in ("sa_1", "sub/DSC 01", "2011-04-05 (2).x_y", "größe/ä"):
        assert file_name(key) == key


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(KEYS, COMMON))
def test_the_key_can_be_read_back_and_the_name_is_usable_everywhere(key: str) -> None:
    if key_problem(key):
        return
    name = file_name(key)
    assert unquote(name.replace("%/", "")) == key
    assert not PurePosixPath(name).is_absolute() and not PureWindowsPath(name).anchor
    assert PureWindowsPath(name).as_posix() == name  # no part vanishes, no drive appears
    for part in name.split("/"):
        assert 0 < len(part.encode()) < 240 and part[0] not in ". " and part[-1] not in ". "
        assert not set(part) & set('<>:"|?*\\') and not PureWindowsPath(part).is_reserved()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(KEYS, COMMON), st.one_of(KEYS, COMMON))
def test_two_keys_never_share_a_file(one: str, other: str) -> None:
    if one != other and not key_problem(one) and not key_problem(other):
        assert file_name(one) != file_name(other)


def test_long_names_can_be_written(tmp_path: Path) -> None:
    for key in ("x" * 255, "ü" * 127, "%" * 255):
        path = tmp_path / f"{file_name(key)}.view12.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert path.is_file()
