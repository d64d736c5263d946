"""Building an SA-1B tree from shards and folders."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from samdistill import io as writing
from samdistill.config import DataConfig
from samdistill.data import open_source, prepare_sa1b
from samdistill.types import UserError


def jpeg(index: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (12, 10), (index * 7 % 256, 40, 90)).save(out, "JPEG")
    return out.getvalue()


def annotation(index: int) -> bytes:
    image = {"image_id": index, "width": 12, "height": 10, "file_name": f"sa_{index}.jpg"}
    return json.dumps({"image": image, "annotations": []}).encode()


def extracted(root: Path, indices: range) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in indices:
        (root / f"sa_{i}.jpg").write_bytes(jpeg(i))
        (root / f"sa_{i}.json").write_bytes(annotation(i))
    return root


def shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pairs(indices: range) -> dict[str, bytes]:
    return {n: c for i in indices for n, c in ((f"./sa_{i}.jpg", jpeg(i)), (f"./sa_{i}.json", annotation(i)))}


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_shards_and_folders_make_one_tree(tmp_path: Path) -> None:
    extracted(tmp_path / "src/part/deep", range(10))
    shard(tmp_path / "src/sa_000001.tar", pairs(range(10, 30)))
    (tmp_path / "src/README.txt").write_text("licence")
    calls: list[tuple[int, int]] = []
    report = prepare_sa1b(tmp_path / "src", tmp_path / "dst", 0.2, lambda a, b: calls.append((a, b)))
    assert report.train + report.val == 30 and 1 <= report.val <= 14
    assert (report.linked, report.copied, report.present, report.ignored) == (20, 40, 0, 1)
    assert report.problems == [] and calls == [(i, 30) for i in range(1, 31)]
    for i in range(30):
        found = sorted((tmp_path / "dst").glob(f"*/*/sa_{i}.*"))
        assert [p.read_bytes() for p in found] == [annotation(i), jpeg(i)]
        assert found[0].parent.name == found[1].parent.name
    assert os.path.samefile(next((tmp_path / "dst").glob("images/*/sa_3.jpg")), tmp_path / "src/part/deep/sa_3.jpg")
    data = DataConfig(root=tmp_path / "dst")
    train, held_out = open_source(data, "train"), open_source(data, "held_out")
    assert (len(train.keys), len(held_out.keys)) == (report.train, report.val)
    assert train.problems == held_out.problems == [] and train.load(train.keys[0]).size == (12, 10)


def test_a_single_shard_is_a_source(tmp_path: Path) -> None:
    report = prepare_sa1b(shard(tmp_path / "a.tar", pairs(range(3))), tmp_path / "dst", 0)
    assert (report.train, report.val) == (3, 0)


def test_running_again_changes_nothing_and_more_shards_move_nothing(tmp_path: Path) -> None:
    shard(tmp_path / "src/a.tar", pairs(range(3)))
    prepare_sa1b(tmp_path / "src", tmp_path / "dst", 0.05)
    before = content(tmp_path / "dst")
    again = prepare_sa1b(tmp_path / "src", tmp_path / "dst", 0.05)
    assert (again.linked, again.copied, again.present) == (0, 0, 6) and content(tmp_path / "dst") == before
    shard(tmp_path / "src/b.tar", pairs(range(3, 60)))
    more = prepare_sa1b(tmp_path / "src", tmp_path / "dst", 0.05)
    assert more.train + more.val == 60 and more.copied == 114
    assert before.items() <= content(tmp_path / "dst").items()
    with pytest.raises(UserError, match=r"was prepared with val_fraction=0.05, not 0.1"):
        prepare_sa1b(tmp_path / "src", tmp_path / "dst", 0.1)


def test_split_does_not_depend_on_the_form_of_the_source(tmp_path: Path) -> None:
    extracted(tmp_path / "loose", range(40))
    shard(tmp_path / "packed/a.tar", pairs(range(40)))
    for name in ("loose", "packed"):
        prepare_sa1b(tmp_path / name, tmp_path / f"{name}-out", 0.3)
    assert content(tmp_path / "loose-out") == content(tmp_path / "packed-out")


def test_skipped_inputs_are_counted_and_listed(tmp_path: Path) -> None:
    src = extracted(tmp_path / "src", range(8))
    (src / "sa_0.jpg").unlink()
    (src / "sa_1.json").unlink()
    (src / "sa_2.json").write_text('{"image"')
    (src / "sa_3.json").write_text("[]")
    (src / "sa_4.jpg").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(src / "sa_5.jpg", "PNG")
    (src / "more").mkdir()
    shutil.copy(src / "sa_6.jpg", src / "more")
    (src / "old.tar.gz").write_bytes(b"x")
    report = prepare_sa1b(src, tmp_path / "dst", 0)
    assert report.train == 2
    reasons = dict(report.problems)
    assert reasons["sa_0"] == "JSON without its image" and reasons["sa_1"] == "image without its JSON"
    assert "JSON is not readable" in reasons["sa_2"] and "should be an object" in reasons["sa_3"]
    assert "image is not readable" in reasons["sa_4"] and "is PNG" in reasons["sa_5"]
    assert reasons["sa_6.jpg"].startswith("duplicate: ") and "unpack" in reasons[str(src / "old.tar.gz")]
    assert len(report.problems) == 8 and "8 inputs skipped" in str(report)
    assert len((tmp_path / "dst/skipped.txt").read_text().splitlines()) == 8
    names = {p.stem for p in (tmp_path / "dst").glob("*/*/sa_*")}
    assert names == {"sa_6", "sa_7"}


def member_offset(path: Path, name: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def test_a_damaged_header_costs_its_member_alone(tmp_path: Path) -> None:
    path = shard(tmp_path / "src/a.tar", pairs(range(6)))
    raw = bytearray(path.read_bytes())
    offset = member_offset(path, "./sa_2.jpg")
    raw[offset + 10 : offset + 40] = b"\xff" * 30
    path.write_bytes(raw)
    report = prepare_sa1b(tmp_path / "src", tmp_path / "dst", 0)
    assert report.train == 5
    assert [key for key, _ in report.problems] == [str(path), "sa_2"]
    assert f"bytes {offset} to" in report.problems[0].reason


@pytest.mark.parametrize("cut", ["in a member", "in a header", "between"])
def test_a_truncated_shard_keeps_what_is_whole(tmp_path: Path, cut: str) -> None:
    path = shard(tmp_path / "src/a.tar", pairs(range(6)))
    at = member_offset(path, "./sa_4.jpg") + {"in a member": 700, "in a header": 100, "between": 0}[cut]
    os.truncate(path, at)
    report = prepare_sa1b(tmp_path / "src", tmp_path / "dst", 0)
    assert report.train == 4
    assert bool(report.problems) == (cut != "between")  # a cut between members leaves no trace in the file
    assert {p.stem for p in (tmp_path / "dst").glob("*/*/sa_*")} == {f"sa_{i}" for i in range(4)}


def test_a_shard_that_is_no_tar_is_listed(tmp_path: Path) -> None:
    extracted(tmp_path / "src", range(2))
    (tmp_path / "src/noise.tar").write_bytes(os.urandom(5000))
    report = prepare_sa1b(tmp_path / "src", tmp_path / "dst", 0)
    assert report.train == 2 and [key for key, _ in report.problems] == [str(tmp_path / "src/noise.tar")]


def test_members_cannot_leave_the_tree(tmp_path: Path) -> None:
    files = {f"../../../sa_{i}{s}": c for i in range(2) for s, c in ((".jpg", jpeg(i)), (".json", annotation(i)))}
    prepare_sa1b(shard(tmp_path / "a/b/c/a.tar", files), tmp_path / "a/b/dst", 0)
    assert not list(tmp_path.glob("sa_*")) and len(list((tmp_path / "a/b/dst").glob("*/train/sa_*"))) == 4


def test_copies_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    report = prepare_sa1b(extracted(tmp_path / "src", range(3)), tmp_path / "dst", 0)
    assert (report.linked, report.copied) == (0, 6)
    assert not os.path.samefile(tmp_path / "dst/images/train/sa_1.jpg", tmp_path / "src/sa_1.jpg")


def test_a_full_disk_is_said_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shard(tmp_path / "a.tar", pairs(range(6)))
    with monkeypatch.context() as patched:
        settle, room = writing._settle, iter(range(1 + 7))  # the settings, then seven files

        def fill(new: Path, sync: bool) -> None:
            if next(room, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            settle(new, sync)

        patched.setattr(writing, "_settle", fill)
        with pytest.raises(UserError, match=r"No space left on device .* run it again"):
            prepare_sa1b(source, tmp_path / "dst", 0)
    assert len(list((tmp_path / "dst").glob("*/*/sa_*"))) == 7
    assert prepare_sa1b(source, tmp_path / "dst", 0).train == 6
    prepare_sa1b(source, tmp_path / "fresh", 0)
    assert content(tmp_path / "dst") == content(tmp_path / "fresh")


def test_killed_in_the_middle_and_run_again_gives_the_same_tree(tmp_path: Path) -> None:
    source = shard(tmp_path / "src/a.tar", pairs(range(150)))
    extracted(tmp_path / "src/loose", range(150, 300))
    prepare_sa1b(tmp_path / "src", tmp_path / "fresh", 0.2)
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom samdistill.data import prepare_sa1b\n"
        "def die(done, total):\n    if done == 40: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare_sa1b(Path(sys.argv[1]), Path(sys.argv[2]), 0.2, die)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "src"), str(tmp_path / "dst")]
    victim = subprocess.run(command, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    assert victim.returncode == -signal.SIGKILL
    half = {n: c for n, c in content(tmp_path / "dst").items() if not Path(n).name.startswith(".")}
    assert 40 <= len(half) < len(content(tmp_path / "fresh"))
    assert half.items() <= content(tmp_path / "fresh").items()  # nothing is half-written
    (tmp_path / "dst/images/train/.sa_9.jpg.partial").write_bytes(b"half")
    report = prepare_sa1b(tmp_path / "src", tmp_path / "dst", 0.2)
    assert report.present > 0 and report.train + report.val == 300 and source.is_file()
    assert content(tmp_path / "dst") == content(tmp_path / "fresh")


def test_user_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pair"):
        prepare_sa1b(tmp_path / "empty", tmp_path / "dst")
    with pytest.raises(UserError, match="does not exist"):
        prepare_sa1b(tmp_path / "none", tmp_path / "dst")
    with pytest.raises(UserError, match="also the destination"):
        prepare_sa1b(tmp_path / "empty", tmp_path / "empty")
    with pytest.raises(UserError, match=r"val_fraction 1\.5"):
        prepare_sa1b(tmp_path / "empty", tmp_path / "dst", 1.5)


def test_a_destination_inside_the_source_is_not_read_again(tmp_path: Path) -> None:
    extracted(tmp_path / "src", range(5))
    for _ in range(2):
        report = prepare_sa1b(tmp_path / "src", tmp_path / "src/prepared", 0)
        assert report.train == 5 and report.problems == []
