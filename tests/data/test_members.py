"""A byte range of a shard as a file, against ``tarfile`` and ``BytesIO``."""

from __future__ import annotations

import io
import os
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samdistill.data import members, upright_size
from samdistill.data.members import Member, scan, state_of

SIZES = (0, 1, 511, 512, 513, 200_000)


def shard(path: Path, contents: list[bytes]) -> list[Member]:
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(contents):
            info = tarfile.TarInfo(f"./sa_{number}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "sa_0.jpg"
        tar.addfile(link)
    problems: list = []
    state = state_of(path.stat())
    found = [Member(str(path), state, *entry) for entry in scan(str(path), state[0], problems)]
    assert problems == [] and [m.name for m in found] == [f"sa_{i}.jpg" for i in range(len(contents))]
    return found


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that are opened as descriptors from now on."""
    paths, real = list[str](), os.open
    members._handle.cache_clear()
    monkeypatch.setattr(os, "open", lambda path, *rest, **named: paths.append(path) or real(path, *rest, **named))
    return paths


def test_a_member_reads_like_a_file(tmp_path: Path) -> None:
    contents = [random.Random(size).randbytes(size) for size in SIZES]
    found = shard(tmp_path / "a.tar", contents)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert (
            [m.read_bytes() for m in found]
            == contents
            == [
                tar.extractfile(f"./{m.name}").read()
                for m in found  # type: ignore[union-attr]
            ]
        )
    draw = random.Random(0)
    for member, content in zip(found, contents, strict=True):
        assert (member.suffix, str(member)) == (".jpg", f"{tmp_path / 'a.tar'}:{member.name}")
        with member.open() as ours:
            theirs = io.BytesIO(content)
            for _ in range(50):
                whence, count = draw.choice((0, 0, 1, 2)), draw.randrange(3000)
                place = draw.randrange(len(content) + 700) if whence == 0 else draw.randrange(-5, 300)
                if whence == 0 or theirs.tell() + 300 < len(content) or place >= 0:
                    place = max(place, 0) if whence != 2 else -min(len(content), 17)
                    assert ours.seek(place, whence) == theirs.seek(place, whence)
                assert ours.read(count) == theirs.read(count) and ours.tell() == theirs.tell()
    with pytest.raises(ValueError, match="opened with 'rb'"):
        found[0].open("wb")


def test_one_descriptor_serves_threads_and_forked_processes(tmp_path: Path, opened: list[str]) -> None:
    contents = [random.Random(n).randbytes(70_000 + n) for n in range(40)]
    found = shard(tmp_path / "a.tar", contents)
    opened.clear()
    assert found[0].read_bytes() == contents[0]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(Member.read_bytes, found)) == contents
    if (child := os.fork()) == 0:
        os._exit(0 if [m.read_bytes() for m in found] == contents else 1)
    assert [m.read_bytes() for m in found] == contents
    assert os.waitpid(child, 0)[1] == 0 and opened == [str(tmp_path / "a.tar")]


def test_descriptors_are_bounded_and_an_open_member_keeps_its_own(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, close = list[int](), os.close
    monkeypatch.setattr(members, "_handle", lru_cache(2)(members._handle.__wrapped__))
    found = [shard(tmp_path / f"{n}.tar", [bytes([n]) * 100_000])[0] for n in range(5)]
    opened.clear()
    monkeypatch.setattr(os, "close", lambda number: closed.append(number) or close(number))
    with found[0].open() as first:
        assert first.read(10) == bytes(10)
        assert [m.read_bytes()[0] for m in found] == [0, 1, 2, 3, 4]
        assert len(opened) == 5 and len(closed) == 2  # 1 and 2: the first is still read, 3 and 4 are kept
        assert first.read() == bytes(99_990)
    del first
    assert len(closed) == 3


def test_no_more_is_read_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of an image is in its header: one buffer of a large file, and nothing of its neighbours."""
    noise, file = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8), io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=95)
    found = shard(tmp_path / "a.tar", [b"x", file.getvalue(), b"y"])[1]
    read, pread = list[tuple[int, int]](), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, at: read.append((at, count)) or pread(fd, count, at))
    assert upright_size(found) == (700, 900)
    assert sum(count for _, count in read) <= 1 << 17 < found.size // 4
    assert all(found.offset <= at and at + count <= found.offset + found.size for at, count in read)


def test_a_shard_that_ends_early_is_an_error(tmp_path: Path) -> None:
    found = shard(tmp_path / "a.tar", [b"x" * 9000])[0]
    with pytest.raises(OSError, match="its shard ends inside this member"):
        found._replace(size=1 << 20).read_bytes()
