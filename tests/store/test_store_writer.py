"""The published record byte for byte, specs that differ, ranks, full disks."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import pytest
import torch

import samdistill.store.writer as module
from samdistill.store import SYNC_RECORDS, FeatureStore, FeatureStoreWriter, make_codec, stored_codec
from samdistill.types import UserError

KEYS = [f"sa_{i}" for i in range(10)]


def test_a_store_byte_for_byte(tiny, tmp_path):
    spec = tiny.spec(shape=(1, 1, 2))
    with FeatureStoreWriter(tmp_path / "store", spec, make_codec("fp16", (1, 1, 2))) as writer:
        writer.write("sa_1", -3, torch.tensor([[[0.5, -2.0]]]))
        writer.write("höhe/2", 2**31 - 1, torch.tensor([[[1.0, 4.0]]]))
    first, second = struct.pack("<i2e", -3, 0.5, -2.0), struct.pack("<i2e", 2**31 - 1, 1.0, 4.0)
    content = tiny.content(tmp_path / "store")
    assert set(content) == {"manifest.json", "rank0-index.bin", "rank0-keys.txt", "rank0-values.bin"}
    assert content["rank0-values.bin"] == first + second
    assert content["rank0-keys.txt"] == "sa_1\nhöhe/2\n".encode()
    names = [b"sa_1", "höhe/2".encode()]
    hashes = [blake2b(name, digest_size=8).digest() for name in names]
    assert content["rank0-index.bin"] == b"".join(
        hash_ + struct.pack("<QI", end, zlib.crc32(record))
        for hash_, end, record in zip(hashes, (5, 13), (first, second), strict=True)
    )
    assert json.loads(content["manifest.json"]) == {
        "format": "samdistill-features",
        "version": 1,
        "tap": "image_embedding",
        "shape": [1, 1, 2],
        "image_size": 126,
        "teacher": "aa11",
        "transform": "bb22",
        "codec": "fp16",
        "dtype": "float16",
        "record_bytes": 8,
        "codec_digest": None,
    }


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("teacher", "cc33", "teacher: stored aa11, wanted cc33"),
        ("transform", "dd44", "transform: stored bb22, wanted dd44"),
        ("image_size", 1008, "image_size: stored 126, wanted 1008"),
        ("tap", "fpn_3", "tap: stored image_embedding, wanted fpn_3"),
        ("codec", "int8", "codec: stored fp16, wanted int8"),
        ("shape", (5, 4, 3), "shape: stored 5x3x4, wanted 5x4x3"),
    ],
)
def test_a_store_made_otherwise_is_refused_by_writer_and_reader(tiny, tmp_path, field, value, text):
    tiny.write(tmp_path, KEYS)
    wanted = replace(tiny.spec(), **{field: value})
    with pytest.raises(UserError) as writing:
        FeatureStoreWriter(tmp_path, wanted, make_codec(wanted.codec, wanted.shape))
    with pytest.raises(UserError) as reading:
        FeatureStore(tmp_path, expect=wanted)
    for message in (str(writing.value), str(reading.value)):
        assert text in message and str(tmp_path) in message and "\n" not in message
        assert message.count("stored ") == 1
    assert len(FeatureStore(tmp_path, expect=tiny.spec())) == 10


def test_every_difference_is_named(tiny, tmp_path):
    tiny.write(tmp_path, KEYS)
    with pytest.raises(UserError, match="image_size: stored 126, wanted 98; teacher: stored aa11, wanted x;"):
        FeatureStore(tmp_path, expect=replace(tiny.spec(), teacher="x", image_size=98))


def test_another_basis_is_refused_and_the_stored_one_is_found(tiny, tmp_path):
    tiny.write(tmp_path, KEYS[:5], "pca3-int8")
    other = make_codec("pca3-int8", tiny.shape)
    other.fit([tiny.features("something else")])
    with pytest.raises(UserError, match=r"codec_digest: stored .*, wanted"):
        FeatureStoreWriter(tmp_path, tiny.spec("pca3-int8"), other)
    with FeatureStoreWriter(tmp_path, tiny.spec("pca3-int8"), stored_codec(tmp_path)) as writer:
        assert writer.done == set(KEYS[:5])
    assert stored_codec(tmp_path / "nowhere") is None


def test_programming_errors(tiny, tmp_path):
    for codec in (make_codec("int8", tiny.shape), make_codec("fp16", (5, 4, 3))):
        with pytest.raises(ValueError, match="not fitted, or not the one"):
            FeatureStoreWriter(tmp_path, tiny.spec(), codec)
    with pytest.raises(ValueError, match="not fitted"):
        FeatureStoreWriter(tmp_path, tiny.spec("pca3-int8"), make_codec("pca3-int8", tiny.shape))
    with pytest.raises(ValueError, match="rank 2 of 2"):
        FeatureStoreWriter(tmp_path, tiny.spec(), make_codec("fp16", tiny.shape), 2, 2)
    writer = FeatureStoreWriter(tmp_path, tiny.spec(), make_codec("fp16", tiny.shape))
    with writer, pytest.raises(ValueError, match="not an int32"):
        writer.write("a", 2**31, tiny.features("a"))


def test_refused_records_leave_no_trace(tiny, tmp_path, codec_name):
    tiny.write(tmp_path / "clean", KEYS, codec_name)
    with FeatureStoreWriter(tmp_path / "tried", tiny.spec(codec_name), tiny.codec(codec_name)) as writer:
        for key in KEYS:
            with pytest.raises(UserError, match=f"'{key}': features hold NaN"):
                writer.write(key, 0, torch.full(tiny.shape, float("nan")))
            with pytest.raises(UserError, match=f"'{key}': the feature map is 1x1x1"):
                writer.write(key, 0, torch.zeros(1, 1, 1))
            writer.write(key, len(key), tiny.features(key))
            with pytest.raises(UserError, match=f"'{key}' is in the store already"):
                writer.write(key, 0, tiny.features(key))
        for bad in ("", "two\nlines", "\ud800"):
            with pytest.raises(UserError, match="rename the file"):
                writer.write(bad, 0, tiny.features("x"))
    assert tiny.content(tmp_path / "tried") == tiny.content(tmp_path / "clean")


def test_done_spans_ranks_and_another_world_repeats_nothing(tiny, tmp_path):
    for rank in range(3):
        tiny.write(tmp_path, KEYS[rank:6:3], rank=rank, world=3)
    for rank in range(2):
        tiny.write(tmp_path, KEYS[rank::2], rank=rank, world=2)
    store = FeatureStore(tmp_path)
    assert sorted(store.keys) == sorted(KEYS) and len(store) == 10
    assert not store.verify()
    assert store.keys[:3] == ["sa_0", "sa_3", "sa_6"]


def test_the_torn_tail_of_a_rank_that_is_gone_is_cut_by_its_heir(tiny, tmp_path):
    for rank in range(3):
        tiny.write(tmp_path, KEYS[rank::3], rank=rank, world=3)
    with (tmp_path / "rank2-values.bin").open("ab") as file:
        file.write(b"torn")
    tiny.write(tmp_path, [], rank=1, world=2)
    assert FeatureStore(tmp_path).verify()
    with FeatureStoreWriter(tmp_path, tiny.spec(), tiny.codec("fp16"), 0, 2) as writer:
        assert writer.recovered == ["rank2-values.bin: 4 bytes cut behind record 3"]
    assert not FeatureStore(tmp_path).verify()


def test_files_without_a_manifest_are_not_touched(tiny, tmp_path):
    (tmp_path / "rank0-values.bin").write_bytes(b"someone else's")
    with pytest.raises(UserError, match=r"holds rank0-values.bin but no manifest.json"):
        FeatureStoreWriter(tmp_path, tiny.spec(), tiny.codec("fp16"))
    assert (tmp_path / "rank0-values.bin").read_bytes() == b"someone else's"


@pytest.mark.parametrize("name", ["rank0-index.bin", "rank0-keys.txt"])
def test_values_that_nothing_vouches_for_are_not_cut_away(tiny, tmp_path, name):
    tiny.write(tmp_path, [f"k{i}" for i in range(2 * SYNC_RECORDS + 1)])
    (tmp_path / name).write_bytes(b"")
    before = tiny.content(tmp_path)
    with pytest.raises(UserError, match=r"holds 65 records, but .* list 0; restore"):
        FeatureStoreWriter(tmp_path, tiny.spec(), tiny.codec("fp16"))
    assert tiny.content(tmp_path) == before


def test_a_path_that_cannot_be_a_store(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file(/below)?: cannot be written: "):
            FeatureStoreWriter(root, tiny.spec(), tiny.codec("fp16"))


def test_a_second_process_cannot_write_the_same_rank(tiny, tmp_path):
    pytest.importorskip("fcntl")
    script = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'wb'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "rank0.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is writing here"):
            FeatureStoreWriter(tmp_path, tiny.spec(), tiny.codec("fp16"))
    finally:
        holder.kill()
        holder.communicate()
    tiny.write(tmp_path, KEYS)
    assert "rank0.lock" not in tiny.content(tmp_path)


@contextmanager
def _file_size_limit(size: int):
    """The kernel itself refuses to let any file grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(tiny, tmp_path):
    shape, keys = (64, 64, 64), [f"k{i}" for i in range(6)]
    spec, codec = tiny.spec(shape=shape), make_codec("fp16", shape)
    for root in (tmp_path / "full", tmp_path / "roomy"):
        limit = 3 * codec.record_bytes + 1000 if root.name == "full" else 10**9
        with FeatureStoreWriter(root, spec, codec) as writer, _file_size_limit(limit):
            for key in keys:
                try:
                    writer.write(key, 7, tiny.features(key, shape))
                except UserError as error:
                    message = str(error)
                    break
    assert message.startswith(f"{tmp_path / 'full'}: cannot be written: File too large (")
    assert f"at the record of 'k3' ({codec.record_bytes + 20 + 3} bytes); everything written before is kept" in message
    free = int(re.search(r"\((\d+) bytes free\)", message)[1])
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.5) and "run again to resume" in message
    store = FeatureStore(tmp_path / "full")
    assert store.keys == keys[:3] and not store.verify()
    with FeatureStoreWriter(tmp_path / "full", spec, codec) as writer:
        assert writer.done == set(keys[:3]) and writer.recovered == []
        for key in keys[3:]:
            writer.write(key, 7, tiny.features(key, shape))
    assert tiny.content(tmp_path / "full") == tiny.content(tmp_path / "roomy")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("halves", [0, 1])
@pytest.mark.parametrize("append", range(3))
def test_a_failure_in_any_append_rolls_back_and_the_writer_goes_on(tiny, tmp_path, monkeypatch, append, halves, error):
    """The value, the index entry or the key of the second record fails, at once or after half of its bytes."""
    tiny.write(tmp_path / "clean", KEYS)
    original, calls = module._put, itertools.count()

    def failing(file, offset, data):
        if next(calls) == 3 + append:
            original(file, offset, data[: len(data) // 2 * halves])
            raise error
        original(file, offset, data)

    with FeatureStoreWriter(tmp_path / "tried", tiny.spec(), tiny.codec("fp16")) as writer:
        monkeypatch.setattr(module, "_put", failing)
        with pytest.raises((UserError, KeyboardInterrupt)):
            for key in KEYS:
                writer.write(key, len(key), tiny.features(key))
        monkeypatch.setattr(module, "_put", original)
        assert writer.done == {KEYS[0]}
        assert not FeatureStore(tmp_path / "tried").verify()
        for key in KEYS:
            if key not in writer.done:
                writer.write(key, len(key), tiny.features(key))
    assert tiny.content(tmp_path / "tried") == tiny.content(tmp_path / "clean")


def test_short_writes_are_completed(tiny, tmp_path, monkeypatch):
    class Trickle:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:3])

        def __getattr__(self, name):
            return getattr(self.file, name)

    original = module._put
    monkeypatch.setattr(module, "_put", lambda file, offset, data: original(Trickle(file), offset, data))
    tiny.write(tmp_path / "trickled", KEYS)
    monkeypatch.undo()
    tiny.write(tmp_path / "clean", KEYS)
    assert tiny.content(tmp_path / "trickled") == tiny.content(tmp_path / "clean")


def test_fsync_every_batch_and_at_close(tiny, tmp_path, monkeypatch):
    synced: list[int] = []
    sync = os.fsync
    with FeatureStoreWriter(tmp_path, tiny.spec(), tiny.codec("fp16")) as writer:
        descriptors = {file.fileno() for file in writer._files}
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), sync(fd))[1])
        for number in range(SYNC_RECORDS - 1):
            writer.write(f"k{number}", 0, tiny.features("x"))
        assert not synced
        writer.write("last of the batch", 0, tiny.features("x"))
        assert set(synced) == descriptors and len(synced) == 3
        writer.write("one more", 0, tiny.features("x"))
    assert len(synced) == 6
    writer.close()
    assert np.all(np.isin(synced, list(descriptors)))
