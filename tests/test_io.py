"""Every file is whole or untouched, has plain permissions, and a failing disk is one line."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from samdistill import io
from samdistill.types import UserError

LARGE = b"x" * 200_000


@contextmanager
def full(limit: int = 1000) -> Iterator[None]:
    """Files of this process cannot grow beyond ``limit`` bytes: EFBIG, which is treated like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def replaced_by(write: Callable[[Path], object]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        with io.replacing(path) as new:
            write(new)

    return act


def torch_archive(path: Path) -> None:
    with io.writing(path) as file:
        torch.save({"a": torch.zeros(100_000)}, file)


def folder(new: Path) -> None:
    new.mkdir()
    (new / "inside").write_bytes(LARGE)


WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: io.write_bytes(path, LARGE),
    "text": lambda path: io.write_text(path, "x" * 200_000),
    "json": lambda path: io.write_json(path, "x" * 200_000),
    "lines": lambda path: io.write_lines(path, ["x" * 200_000]),
    "synced": lambda path: io.write_bytes(path, LARGE, sync=True),
    "torch": torch_archive,
    "safetensors": replaced_by(lambda new: save_file({"a": torch.zeros(100_000)}, new)),
    "numpy": replaced_by(lambda new: np.savez(new.open("wb"), a=np.zeros(100_000))),
    "folder": replaced_by(folder),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there_and_says_so_in_one_line(name: str, tmp_path: Path) -> None:
    target = tmp_path / "out.x"
    if name == "folder":
        target.mkdir()
        (target / "inside").write_text("old")
    else:
        target.write_text("old")
    with full(), pytest.raises(UserError) as error:
        WRITERS[name](target)
    assert str(error.value).startswith(f"{target}: cannot be written: ") and "\n" not in str(error.value)
    assert "too large" in str(error.value)
    assert (target / "inside" if name == "folder" else target).read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    WRITERS[name](target)  # with room it is replaced
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "inside" if name == "folder" else target).read_bytes()[:3] != b"old"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o644)])
def test_permissions_are_plain_whatever_a_library_gives(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        io.write_text(tmp_path / "a", "x")
        with io.Appender(tmp_path / "b") as log:
            log.write("x")
        with io.replacing(tmp_path / "c") as new:
            new.mkdir()
            save_file({"a": torch.zeros(1)}, new / "inner")
            (new / "run").touch(mode=0o700)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {"a": mode, "b": mode, "inner": mode, "run": mode}
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == (0o755 & ~umask)


APPEND = {"append": lambda path: io.Appender(path), "in place": lambda path: io.open_records(path)}


@pytest.mark.parametrize("name", [*WRITERS, *APPEND])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_at_the_destination_is_refused_and_its_target_stays(name: str, dangling: bool, tmp_path: Path) -> None:
    precious, link = tmp_path / "precious", tmp_path / "link"
    if not dangling:
        precious.write_text("keep")
    link.symlink_to(precious)
    with pytest.raises(UserError, match=r"link: is a symbolic link to .*precious; give another path"):
        (WRITERS | APPEND)[name](link)
    assert link.is_symlink() and precious.exists() is not dangling and (dangling or precious.read_text() == "keep")
    assert not list(tmp_path.glob(".*"))


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        io.write_text(tmp_path / "pipe", "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_missing_folder_or_one_in_the_way_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/a: cannot be written: No such file or directory"):
        io.write_text(tmp_path / "none" / "a", "x")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match=r"folder: cannot be written: Is a directory"):
        io.write_text(tmp_path / "folder", "x")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a: cannot be written: Not a directory"):
        io.write_text(tmp_path / "file" / "a", "x")
    with pytest.raises(UserError, match=r"file"):
        io.make_folder(tmp_path / "file" / "below")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_an_error_of_the_system_without_a_file_name_names_the_file(number: int, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error, io.replacing(tmp_path / "out", hint="free some space"):
        raise OSError(number, os.strerror(number))
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'out'}: cannot be written: {os.strerror(number)}")
    assert said.endswith("; free some space") and ("bytes free" in said) is (number in io.FULL)


def test_what_a_library_wraps_a_full_disk_in_is_seen_through(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left on device"), io.replacing(tmp_path / "out"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("writer failed") from error


def test_other_errors_are_not_the_disks(tmp_path: Path) -> None:
    for mine in (RuntimeError("a fault"), ValueError("x"), BrokenPipeError(errno.EPIPE, "pipe"), KeyboardInterrupt()):
        with pytest.raises(type(mine)), io.replacing(tmp_path / "out") as new:
            new.write_text("half")
            raise mine
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=rf"^{tmp_path / 'given'}: No such file"), io.replacing(tmp_path / "out"):
        (tmp_path / "given").read_text()  # what could not be read is named, not what should have been written


def test_files_are_added_to_a_folder_over_those_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "keep").write_text("keep")
    with io.adding(tmp_path) as new:
        (new / "a").write_text("new")
        (new / "b").write_text("b")
        assert (tmp_path / "a").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "b", "keep": "keep"}


def test_an_append_that_fails_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with io.Appender(path) as log:
        log.write("first\n")
        with full(10), pytest.raises(UserError, match=r"log: cannot be written: "):
            log.write("a longer line\n")
        log.write(b"last\n")
        log.sync()
    log.close()
    assert path.read_text() == "first\nlast\n"


def test_names_that_are_not_utf8_are_escaped_and_json_is_plain(tmp_path: Path) -> None:
    io.write_text(tmp_path / "a", "caf\udce9 é")
    assert (tmp_path / "a").read_bytes() == rb"caf\udce9 " + "é".encode()
    io.write_json(tmp_path / "b", {"a": 1})
    assert json.loads((tmp_path / "b").read_text()) == {"a": 1}


def test_long_names_and_what_a_kill_left(tmp_path: Path) -> None:
    long = tmp_path / ("ü" * 127)
    io.write_text(long, "x")
    assert long.read_text() == "x"
    (tmp_path / ".out.12345678.partial").mkdir()
    (tmp_path / ".out.12345678.partial" / "half").touch()
    (tmp_path / ".other.12345678.partial").touch()
    io.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [long]


def test_paths_as_users_write_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert io.as_path("~/a") == io.as_path(Path("~/a")) == tmp_path / "a"
    for wrong, words in (
        (3, "not a path"),
        ("", "is empty"),
        (None, "not a path"),
        ("a\0b", "null"),
        ("~nobody-here/x", "nobody-here"),
    ):
        with pytest.raises(UserError, match=words):
            io.as_path(wrong)  # type: ignore[arg-type]


def test_a_copy_has_the_content_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(LARGE)
    (tmp_path / "a").chmod(0o700)
    io.copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == LARGE and stat.S_IMODE((tmp_path / "b").stat().st_mode) & 0o100 == 0
