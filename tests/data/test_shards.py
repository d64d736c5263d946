"""Tar shards of SA-1B in place, against the files that they were made of."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pickle
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from samdistill.config import DataConfig
from samdistill.data import (
    BadImage,
    Geometry,
    ImageDataset,
    Sa1bSource,
    ViewTransform,
    image_loader,
    open_source,
    read_image,
    shards,
)
from samdistill.data.fingerprints import fingerprints
from samdistill.data.layouts import data_kind, held_out_images
from samdistill.inference.label import find_images
from samdistill.sandbox.write import write_sa1b
from samdistill.types import UserError

REAL = Path(__file__).parents[3] / "shared" / "data" / "sa1b"
COUNT = 12


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder: 12 rendered images, 3 real ones, and one of each fault that a listing or a reader finds."""
    tree, flat = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("flat")
    write_sa1b(tree, COUNT, 48, seed=1)
    real = sorted(REAL.glob("*"))[:6] if REAL.is_dir() else []
    for path in [*tree.glob("*/train/sa_*"), *real]:
        shutil.copy(path, flat)
    (flat / "sa_1000001.json").unlink()
    (flat / "sa_1000002.jpg").unlink()
    (flat / "sa_1000003.jpg").rename(flat / "sa_1000003.cr2")
    (flat / "sa_1000004.json").write_bytes(b"{")
    (flat / "sa_1000005.jpg").write_bytes((flat / "sa_1000005.jpg").read_bytes()[:300])
    record = json.loads((flat / "sa_1000006.json").read_text())
    record["image"]["width"] += 1
    (flat / "sa_1000006.json").write_text(json.dumps(record))
    (flat / "readme.txt").write_text("not an image")
    return flat


def pack(files: Sequence[Path], path: Path, form: int = tarfile.GNU_FORMAT, folder: str = ".") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for file in files:
            tar.add(file, f"{folder}/{file.name}")
    return path


def packed(extracted: Path, root: Path) -> Path:
    """Three shards of three formats; the pairs at their borders lie in two of them."""
    files = sorted(extracted.iterdir())
    third = len(files) // 3 | 1
    pack(files[:third], root / "sa_000000.tar")
    pack(files[third : 2 * third], root / "sa_000001.tar", tarfile.PAX_FORMAT, "a" * 150)
    pack(files[2 * third :], root / "sa_000002.tar", tarfile.USTAR_FORMAT, "data")
    return root


@pytest.fixture
def root(extracted: Path, tmp_path: Path) -> Path:
    return packed(extracted, tmp_path / "shards")


def config(root: Path, **changes: object) -> DataConfig:
    return DataConfig.model_validate({"root": root, **changes})


def outcome(ask, key: str) -> object:
    try:
        return ask(key)
    except BadImage as error:
        return error.bad.key, error.bad.reason.split(": ", 1)[-1]


def test_shards_equal_the_files_they_were_made_of(extracted: Path, root: Path) -> None:
    theirs, ours = Sa1bSource(extracted, None), Sa1bSource(root, None)
    assert ours.keys == theirs.keys and len(ours.keys) >= COUNT - 3 and Sa1bSource.splits(root) == []
    assert sorted(ours.problems) == sorted(theirs.problems) and len(ours.problems) == 4
    copied = pickle.loads(pickle.dumps(ours))  # a loader worker that is spawned
    for key in ours.keys:
        assert ours.image_file(key).read_bytes() == theirs.path(key).read_bytes()
        for source in (ours, copied):
            assert outcome(source.check, key) == outcome(theirs.check, key)
            assert np.array_equal(outcome(source.load, key), outcome(theirs.load, key))  # type: ignore[arg-type]
        assert np.array_equal(outcome(ours.boxes, key), outcome(theirs.boxes, key))  # type: ignore[arg-type]
        mine, other = outcome(ours.instances, key), outcome(theirs.instances, key)
        assert len(mine) == len(other)  # type: ignore[arg-type]
        for a, b in zip(mine, other, strict=True):  # type: ignore[call-overload]
            assert a == b if isinstance(a, str) else a.id == b.id and np.array_equal(a.mask, b.mask)
    for labels in (False, True):
        prints = [
            fingerprints(lambda key, s=s, labels=labels: s.fingerprint(key, labels), s.keys) for s in (ours, theirs)
        ]
        assert prints[0] == prints[1] and len(set(prints[0].values())) == len(ours.keys)
    assert sum(isinstance(outcome(ours.load, key), tuple) for key in ours.keys) == 3


def test_splits_and_subsets_are_those_of_the_files(extracted: Path, root: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("sa_1000008\nsa_1000007\nsa_1000000\n")
    for changes in ({}, {"fraction": 0.5}, {"held_out_fraction": 0.4}, {"held_out_last": 2}, {"ids": ids}):
        for split in ("train", "held_out"):
            ours, theirs = (open_source(config(place, **changes), split).keys for place in (root, extracted))  # type: ignore[arg-type]
            assert ours == theirs and ours
    assert data_kind(root) == "sa1b" and held_out_images(root).keys == Sa1bSource(extracted, None).keys


def test_loader_workers_give_the_batches_of_the_files(extracted: Path, root: Path) -> None:
    batches = []
    for place, workers in ((extracted, 0), (root, 0), (root, 2)):  # workers inherit the descriptors of the second
        source = Sa1bSource(place, None)
        data = ImageDataset(source, ViewTransform(Geometry(64)), source.keys)
        batches.append(list(image_loader(data, 4, workers)))
    for theirs, *ours in zip(*batches, strict=True):
        for batch, bad in ours:
            assert torch.equal(batch.images, theirs[0].images) and batch.keys == theirs[0].keys
            assert [one.key for one in bad] == [one.key for one in theirs[1]]


def scanned(monkeypatch: pytest.MonkeyPatch, fail: str = "") -> list[str]:
    """Names of the shards whose headers are read from now on. ``fail`` is interrupted."""
    names, scan = list[str](), shards.scan

    def watched(path, size, problems, label):
        names.append(label)
        if label == fail:
            raise KeyboardInterrupt
        yield from scan(path, size, problems, label)

    monkeypatch.setattr(shards, "scan", watched)
    return names


def test_an_interrupted_index_keeps_finished_shards_and_is_made_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_AT_ONCE", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        scanned(patch, fail="sa_000001.tar")
        Sa1bSource(root, None)
    kept = {path.name.removesuffix(".npz") for path in (root / shards.INDEX).iterdir()}
    assert "sa_000000.tar" in kept and "sa_000001.tar" not in kept
    names = scanned(monkeypatch)
    keys = Sa1bSource(root, None).keys
    assert set(names) == {f"sa_00000{i}.tar" for i in range(3)} - kept
    names.clear()
    assert Sa1bSource(root, None).keys == keys and names == []


def test_a_shard_that_another_process_has_finished_is_not_listed_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found missing at first, and there when its turn comes."""
    keys = Sa1bSource(root, None).keys
    names, read, asked = scanned(monkeypatch), shards._read, set[Path]()

    def late(path: Path, state: tuple[int, int], warn: bool):
        first = path not in asked
        asked.add(path)
        return None if first else read(path, state, warn)

    monkeypatch.setattr(shards, "_read", late)
    assert Sa1bSource(root, None).keys == keys and names == []


def test_ranks_start_at_different_shards(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_AT_ONCE", 1)
    names = scanned(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    keys = Sa1bSource(root, None).keys
    assert names == ["sa_000001.tar", "sa_000002.tar", "sa_000000.tar"] and keys == sorted(keys)


@pytest.mark.parametrize("content", [b"", b"noise", "cut", "objects", "columns", "version"])
def test_an_unreadable_index_is_made_again(root: Path, content: object, caplog: pytest.LogCaptureFixture) -> None:
    keys = Sa1bSource(root, None).keys
    path = root / shards.INDEX / "sa_000001.tar.npz"
    whole = path.read_bytes()
    with np.load(path) as file:
        columns = dict(file)
    if content == "objects":
        columns["stems"] = np.array([{}] * len(columns["stems"]), object)
    elif content == "columns":
        columns["ranges"] = columns["ranges"][:-1]
    elif content == "version":
        columns["about"][0] += 1
    np.savez(path, **columns)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING, "samdistill"):
        assert Sa1bSource(root, None).keys == keys
    said = [r.getMessage() for r in caplog.records]
    assert content == "version" or (len(said) == 1 and str(path) in said[0] and "made again" in said[0])
    assert "\n" not in "".join(said)
    with np.load(path, allow_pickle=False) as file:
        assert file["about"][0] == 1 and len(file["stems"]) == len(file["ranges"])


def test_the_index_of_shards_that_cannot_be_written_beside(root: Path, tmp_path: Path) -> None:
    (root / shards.INDEX).write_text("in the way, as a folder that only others can write to is")
    with pytest.raises(UserError, match=r"samdistill-index.*; set data\.index to a folder") as caught:
        open_source(config(root), "train")
    assert "\n" not in str(caught.value)
    keys = open_source(config(root, index=tmp_path / "a/b"), "train").keys
    assert len(keys) > 1 and len(list((tmp_path / "a/b").iterdir())) == 3
    (root / shards.INDEX).unlink()
    Sa1bSource(root, None)
    open_source(config(root, index=tmp_path / "unused"), "train")  # the one beside the shards is read
    assert not (tmp_path / "unused").exists()


def reasons(source: Sa1bSource) -> dict[str, str]:
    return dict(source.problems)


def test_shards_that_vanish_or_change(root: Path, extracted: Path) -> None:
    source = Sa1bSource(root, None)
    key = "sa_1000000"
    path, other = root / "sa_000000.tar", root / "gone"
    assert source.load(key)
    whole = path.read_bytes()
    with open(path, "ab") as file:  # in place, under an open descriptor
        file.write(bytes(512))
    for ask in (source.load, source.check, source.boxes):
        with pytest.raises(BadImage, match=rf"^{key}: .*sa_000000.tar:{key}.jpg .*changed after it was listed; start"):
            ask(key)
    assert fingerprints(source.fingerprint, [key]) == {key: ""}
    assert Sa1bSource(root, None).load(key)  # a new run lists it again
    path.write_bytes(whole)
    source = Sa1bSource(root, None)
    path.rename(other)
    with pytest.raises(BadImage, match=rf"^{key}: .*its shard vanished after it was listed; put it back"):
        source.load(key)
    later = Sa1bSource(root, None)
    assert key not in later.keys and "no longer in data.root; put it back" in reasons(later)["sa_000000.tar"]
    other.rename(path)
    assert Sa1bSource(root, None).keys == source.keys and Sa1bSource(root, None).load(key)


def test_a_shard_that_the_system_cannot_read_ends_the_run_and_keeps_the_others(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount that times out: nothing about the shard is written, so that the next run reads it."""
    keys = Sa1bSource(root, None).keys
    shutil.rmtree(root / shards.INDEX)

    def broken(path, *rest):
        if path.endswith("1.tar"):
            raise OSError(errno.ETIMEDOUT, "Connection timed out")
        return scan(path, *rest)

    scan = shards.scan
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(shards, "scan", broken)
        Sa1bSource(root, None)
    assert str(caught.value).startswith(f"{root / 'sa_000001.tar'}: cannot be read: Connection timed out; finished")
    assert not (root / shards.INDEX / "sa_000001.tar.npz").exists() and Sa1bSource(root, None).keys == keys


def test_a_truncated_shard_keeps_what_is_whole(extracted: Path, tmp_path: Path) -> None:
    files = [extracted / f"sa_100000{i}.{kind}" for i in (0, 7, 8) for kind in ("jpg", "json")]
    path = pack(files, tmp_path / "sa_000000.tar")
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(whole[: last.offset_data + 20])
    source = Sa1bSource(tmp_path, None)
    assert source.keys == ["sa_1000000", "sa_1000007"] and all(source.instances(key) for key in source.keys)
    assert reasons(source)["sa_000000.tar:./sa_1000008.json"] == "shard ends inside this member"
    path.write_bytes(whole)  # the download is completed
    assert Sa1bSource(tmp_path, None).keys == ["sa_1000000", "sa_1000007", "sa_1000008"]


def test_members_listed_twice_are_named_and_the_first_is_used(extracted: Path, tmp_path: Path) -> None:
    both = [extracted / "sa_1000000.jpg", extracted / "sa_1000000.json"]
    other = shutil.copy(extracted / "sa_1000007.jpg", tmp_path / "sa_1000000.jpg")
    pack([*both, both[1]], tmp_path / "s/a.tar")
    pack([Path(other), *both[1:]], tmp_path / "s/b.tar")
    source = Sa1bSource(tmp_path / "s", None)
    assert source.keys == ["sa_1000000"] and source.image_file("sa_1000000").read_bytes() == both[0].read_bytes()
    assert sorted(source.problems) == [
        ("sa_1000000.jpg", "duplicate: b.tar repeats a.tar"),
        ("sa_1000000.json", "duplicate: a.tar repeats a.tar"), ("sa_1000000.json", "duplicate: b.tar repeats a.tar"),
    ]  # fmt: skip


def test_what_is_no_shard_is_named(extracted: Path, root: Path, tmp_path: Path) -> None:
    keys = Sa1bSource(root, None).keys
    (root / "sa_000007.tar.gz").write_bytes(b"x")
    with tarfile.open(root / "sa_000008.tar", "w:gz") as tar:
        tar.add(extracted / "sa_1000000.jpg", "sa_1000000.jpg")
    (root / "sa_000009.tar").write_bytes(os.urandom(5000))
    pack([], root / "sa_000010.tar")
    source = Sa1bSource(root, None)
    assert source.keys == keys
    assert reasons(source)["sa_000007.tar.gz"].startswith("compressed archive; unpack it to .tar")
    assert reasons(source)["sa_000008.tar"] == reasons(source)["sa_000007.tar.gz"]
    assert "no readable member" in reasons(source)["sa_000009.tar"] and "sa_000010.tar" not in reasons(source)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/sa_0.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no image for data.kind=sa1b; 1 inputs .* sa_0.tar.gz: compressed archive"):
        open_source(config(tmp_path / "packed"), "train")
    shutil.copy(extracted / "sa_1000000.jpg", root)
    with pytest.raises(UserError, match=r"has shards \(sa_000000.tar\) and extracted files \(sa_1000000.jpg\); move"):
        open_source(config(root), "train")


@pytest.mark.parametrize(("kinds", "why"), [("json", "JSON without its image"), ("jpg", "image without its JSON")])
def test_shards_of_one_kind_of_file_have_no_pair(extracted: Path, tmp_path: Path, kinds: str, why: str) -> None:
    """Both kinds may come in shards of their own, which pair up when all are there."""
    pack([extracted / f"sa_1000000.{kinds}"], tmp_path / "sa_000000.tar")
    with pytest.raises(UserError, match=f"no image for data.kind=sa1b; 1 inputs .* first sa_1000000: {why}"):
        open_source(config(tmp_path), "train")
    pack([extracted / f"sa_1000000.{kind}" for kind in ("json", "jpg") if kind != kinds], tmp_path / "sa_000001.tar")
    assert Sa1bSource(tmp_path, None).keys == ["sa_1000000"] and Sa1bSource(tmp_path, None).problems == []


def test_commands_that_need_files_say_so(root: Path) -> None:
    with pytest.raises(UserError, match="no images here; tar shards are not read here, extract them with"):
        find_images(root)


def test_bad_names_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x\\y.jpg", "x\\y.json", "sa_é.jpg", "sa_é.json", ".sa_1.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    source = Sa1bSource(tmp_path, None)
    assert source.keys == ["sa_é"] and source.problems == [
        ("'x\\\\y'", "its name holds a backslash; write forward slashes")
    ]
    for name in ("sa_é", "absent", "z" * 99):
        with pytest.raises(BadImage if name == "sa_é" else KeyError):
            source.load(name)


def test_a_list_of_links_selects_shards(root: Path, tmp_path: Path) -> None:
    links = tmp_path / "sa-1b-10p.txt"
    links.write_text("file_name\tcdn_link\nsa_000002.tar\thttps://x.y/z\nsa_000000.tar\thttps://x.y/w?a=b\n\n")
    everything = Sa1bSource(root, None)
    chosen = open_source(config(root, shards=links, held_out_fraction=0.0), "train").keys
    held = {key: {Path(f.shard).name for f in (everything.image_file(key), everything._found.annotation(key))}
            for key in everything.keys}  # fmt: skip
    assert chosen == [key for key, names in held.items() if "sa_000001.tar" not in names]
    assert len(held) > len(chosen) > 0
    for text, said in (
        ("sa_000000.tar\nsa_7.tar\nsa_8.tar x", "2 of the 3 shards in .* are not in data.root: sa_7.tar, sa_8.tar"),
        ("file_name\tcdn_link\n", "names no shard"), (None, "data.shards: cannot read"),
    ):  # fmt: skip
        links.unlink() if text is None else links.write_text(text)
        with pytest.raises(UserError, match=said):
            open_source(config(root, shards=links), "train")


def test_settings_of_shards_are_for_shards(extracted: Path, root: Path) -> None:
    with pytest.raises(UserError, match=r"data.shards: .* has no tar shards"):
        open_source(config(extracted, shards=extracted / "readme.txt"), "train")
    for name in ("shards", "index"):
        with pytest.raises(ValidationError, match=f"'{name}' is for the tar shards of kind 'sa1b'"):
            config(extracted, kind="folder", **{name: extracted})
    with pytest.raises(UserError, match=r"sa_000000.tar:sa_1000000.jpg: is in a shard; extract"):
        Sa1bSource(root, None).path("sa_1000000")
    assert read_image(Sa1bSource(root, None).image_file("sa_1000000")).mode == "RGB"
