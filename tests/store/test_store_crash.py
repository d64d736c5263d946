"""Killed anywhere, resumed, byte-identical."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import samdistill
from samdistill.store import SYNC_RECORDS, FeatureStore, FeatureStoreWriter
from samdistill.types import UserError

NAMES = ("rank0-values.bin", "rank0-index.bin", "rank0-keys.txt")


def _keys(count: int) -> list[str]:
    return [f"key{i}" + "é" * (i % 3) for i in range(count)]


def _cut(root: Path, content: dict[str, bytes], lengths: tuple[int, ...]) -> None:
    for name, length in zip(NAMES, lengths, strict=True):
        (root / name).write_bytes(content[name][:length])


def test_every_state_a_kill_can_leave(tiny, tmp_path):
    """All byte positions of the three appends of each record, in their order."""
    root, shape = tmp_path, (1, 1, 3)
    tiny.write(root, _keys(3), shape=shape)
    content = tiny.content(root)
    ends = [[len(content[name]) // 3 * i for i in range(4)] for name in NAMES[:2]]
    lines = content[NAMES[2]].splitlines(keepends=True)
    ends.append([0, *itertools.accumulate(map(len, lines))])
    states = []
    for record, which in itertools.product(range(3), range(3)):
        for length in range(ends[which][record], ends[which][record + 1] + 1):
            states.append(tuple(length if f == which else ends[f][record + (f < which)] for f in range(3)))
    assert len(states) == 3 * (11 + 21) + sum(len(line) + 1 for line in lines)
    for number, lengths in enumerate(states):
        _cut(root, content, lengths)
        complete = sum(lengths[2] >= end for end in ends[2][1:])
        with FeatureStoreWriter(root, tiny.spec(shape=shape), tiny.codec("fp16", shape)) as writer:
            assert writer.done == set(_keys(complete))
        assert not FeatureStore(root).verify()
        if number % 4 == 0:
            tiny.write(root, _keys(3), shape=shape)
            assert tiny.content(root) == content


@pytest.mark.parametrize("seed", range(25))
def test_files_cut_anywhere(tiny, tmp_path, codec_name, seed):
    """Not only what a kill leaves: after a power cut each file may have any length, and its end may be zeros."""
    keys = _keys(SYNC_RECORDS + 10)
    root = tmp_path / "store"
    tiny.write(root, keys, codec_name)
    content = tiny.content(root)
    generator = np.random.default_rng(seed)
    lengths = tuple(int(generator.integers(len(content[name]) + 1)) for name in NAMES)
    # Values that neither index nor keys list are refused beyond 2 * SYNC_RECORDS; here are fewer.
    _cut(root, content, lengths)
    if seed % 3 == 0:
        path = root / NAMES[seed % 2]
        path.write_bytes(path.read_bytes() + b"\0" * int(generator.integers(300)))
    tiny.write(root, keys, codec_name)
    assert tiny.content(root) == content
    assert not FeatureStore(root).verify()


def test_zeros_in_the_unsynced_window_are_cut_with_all_behind_them(tiny, tmp_path):
    keys = _keys(SYNC_RECORDS + 8)
    tiny.write(tmp_path / "store", keys)
    content = tiny.content(tmp_path / "store")
    size = len(content[NAMES[0]]) // len(keys)
    damaged = bytearray(content[NAMES[0]])
    damaged[20 * size : 21 * size] = bytes(size)
    (tmp_path / "store" / NAMES[0]).write_bytes(damaged)
    with FeatureStoreWriter(tmp_path / "store", tiny.spec(), tiny.codec("fp16")) as writer:
        assert writer.done == set(keys[:20])
        assert len(writer.recovered) == 3 and "behind record 20" in writer.recovered[0]
    tiny.write(tmp_path / "store", keys)
    assert tiny.content(tmp_path / "store") == content


def test_old_damage_costs_no_good_record(tiny, tmp_path):
    keys = _keys(SYNC_RECORDS + 8)
    tiny.write(tmp_path / "store", keys)
    path = tmp_path / "store" / NAMES[0]
    damaged = bytearray(path.read_bytes())
    damaged[10] ^= 1
    path.write_bytes(damaged)
    tiny.write(tmp_path / "store", [*keys, "new"])
    store = FeatureStore(tmp_path / "store")
    assert store.keys == [*keys, "new"]
    assert [problem.key for problem in store.verify()] == [keys[0]]


SCRIPT = """
import sys, time
import numpy as np, torch
from samdistill.store import FeatureStoreWriter, StoreSpec, make_codec
torch.set_num_threads(1)
root, count, codec = sys.argv[1], int(sys.argv[2]), sys.argv[3]
shape = (64, 48, 48)
spec, codec = StoreSpec("image_embedding", shape, 126, "aa", "bb", codec), make_codec(codec, shape)
maker = lambda i: torch.from_numpy(np.random.default_rng(i).normal(size=shape).astype(np.float32))
codec.fit([maker(1000)])
with FeatureStoreWriter(root, spec, codec) as writer:
    print(len(writer.done), flush=True)
    for i in range(count):
        if f"key{i}" not in writer.done:
            writer.write(f"key{i}", i, maker(i))
"""


def _process(root: Path, count: int, codec: str) -> subprocess.Popen:
    source = str(Path(samdistill.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(root), str(count), codec]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)


def test_sigkill_and_resume_is_byte_identical(tiny, tmp_path):
    """One real process killed again and again, against one left alone; the moments fall anywhere in a record."""
    count, codec = 50, "pca8-int8"
    undisturbed = _process(tmp_path / "whole", count, codec)
    assert undisturbed.wait(600) == 0
    expected = tiny.content(tmp_path / "whole")
    size = len(expected[NAMES[0]])
    path, resumed = tmp_path / "killed" / NAMES[0], []
    for share in (0.1, 0.6):
        process = _process(tmp_path / "killed", count, codec)
        while process.poll() is None and not (path.exists() and path.stat().st_size >= share * size):
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(600) == -signal.SIGKILL, "it finished before it could be killed"
        resumed.append(int(process.stdout.readline()))
    assert resumed[0] == 0 < resumed[1] < count
    assert _process(tmp_path / "killed", count, codec).wait(600) == 0
    assert tiny.content(tmp_path / "killed") == expected
    assert len(FeatureStore(tmp_path / "killed")) == count and not FeatureStore(tmp_path / "killed").verify()


FULL = """
mount -t tmpfs -o size=2m tmpfs "$1" && exec "$2" -c '
import sys, torch
from samdistill.store import FeatureStore, FeatureStoreWriter, StoreSpec, make_codec
from samdistill.types import UserError
shape = (128, 32, 32)
spec, codec, root = StoreSpec("t", shape, 126, "aa", "bb", "fp16"), make_codec("fp16", shape), sys.argv[1]
try:
    with FeatureStoreWriter(root, spec, codec) as writer:
        for i in range(99):
            writer.write(f"key{i}", i, torch.full(shape, float(i)))
except UserError as error:
    store = FeatureStore(root)
    print(len(store), len(store.verify()), error)
' "$1"
"""


def test_a_disk_that_is_really_full(tmp_path):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace for a small tmpfs here")
    environment = os.environ | {"PYTHONPATH": str(Path(samdistill.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = ["unshare", "-rm", "sh", "-c", FULL, "sh", str(tmp_path), sys.executable]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if "mount" in result.stderr:
        pytest.skip(f"no tmpfs here: {result.stderr.strip()}")
    words = result.stdout.split()
    assert words[:2] == ["7", "0"], result.stdout + result.stderr
    free, needed = re.search(r"(\d+) bytes free\); at the record of 'key7' \((\d+) bytes\)", result.stdout).groups()
    assert int(needed) == 4 + 2 * 128 * 32 * 32 + 20 + 5 and 0 < int(free) < int(needed)


def test_a_lost_index_is_refused_not_truncated_away(tiny, tmp_path):
    tiny.write(tmp_path, _keys(2 * SYNC_RECORDS + 5))
    (tmp_path / NAMES[1]).unlink()
    with pytest.raises(UserError, match="list 0"):
        tiny.write(tmp_path, [])
