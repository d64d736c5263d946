"""The table of source files beside a store, and records that are renewed in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from samdistill.store import FeatureStore, FeatureStoreWriter, SourceTable


def test_the_last_line_of_a_key_counts_and_of_several_ranks_the_lowest(tmp_path: Path) -> None:
    SourceTable(tmp_path, 3).add({"a": "1", "b": "1"})
    SourceTable(tmp_path, 0).add({"a": "2"})
    SourceTable(tmp_path, 0).add({"a": "3"})
    table = SourceTable(tmp_path)
    assert table.known == {"a": "3", "b": "1"}
    assert table.compare({"a": "3", "b": "0", "c": "1"}) == (["b"], ["c"])


def test_a_torn_line_costs_neither_the_one_before_nor_the_one_after(tmp_path: Path) -> None:
    SourceTable(tmp_path).add({"a": "1", "b": "1"})
    path = tmp_path / "rank0-sources.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    SourceTable(tmp_path).add({"c": "1"})
    assert SourceTable(tmp_path).known == {"a": "1", "c": "1"}


@pytest.mark.parametrize("codec", ["fp16", "int8", "pca3-int8"])
def test_a_renewed_record_is_the_only_thing_that_changes(tmp_path: Path, tiny, codec: str) -> None:
    keys = [f"k{number}" for number in range(40)]
    tiny.write(tmp_path, keys[::2], codec, rank=0, world=2)
    tiny.write(tmp_path, keys[1::2], codec, rank=1, world=2)
    before, table = FeatureStore(tmp_path), tiny.content(tmp_path)
    old = {key: before.read(key) for key in keys}
    with FeatureStoreWriter(tmp_path, tiny.spec(codec), tiny.codec(codec)) as writer:
        writer.expire(["k4", "k7", "unknown"])
        assert "k4" not in writer.done and "k7" not in writer.done and "k5" in writer.done
        for key in ("k4", "k7"):  # the second is in the file of another rank
            writer.write(key, 99, tiny.features("new" + key))
            assert key in writer.done
        writer.write("k40", 3, tiny.features("k40"))
    after = FeatureStore(tmp_path)
    assert after.verify() == [] and len(after) == 41 and after.keys == [*before.keys[:20], "k40", *before.keys[20:]]
    for key in keys:
        found = after.read(key)
        if key in ("k4", "k7"):
            assert found.seed == 99 and not np.allclose(found.features, old[key].features)
        else:
            assert found.seed == old[key].seed and np.array_equal(found.features, old[key].features)
    names = {"rank0-values.bin", "rank0-index.bin", "rank1-values.bin", "rank1-index.bin"}
    assert {name for name, content in tiny.content(tmp_path).items() if table.get(name) != content} == {
        *names, "rank0-keys.txt"
    }  # fmt: skip


def test_a_kill_inside_a_renewal_leaves_no_wrong_record(tmp_path: Path, tiny) -> None:
    """Between the value and its checksum, early and late in the file: what is read back is the old, the new, or an
    error, and the next writer mends it."""
    keys = [f"k{number}" for number in range(60)]
    tiny.write(tmp_path / "whole", keys)
    size = tiny.codec("fp16").record_bytes
    with FeatureStoreWriter(tmp_path / "whole", tiny.spec(), tiny.codec("fp16")) as writer:
        writer.expire(keys[:1])
        writer.write(keys[0], 9, tiny.features("new"))
    record = (tmp_path / "whole" / "rank0-values.bin").read_bytes()[:size]
    for number in (2, 55):
        root = tmp_path / f"torn{number}"
        tiny.write(root, keys)
        with open(root / "rank0-values.bin", "r+b") as file:
            file.seek(number * size)
            file.write(record)
        (problem,) = FeatureStore(root).verify()
        assert problem.key == keys[number]
        with FeatureStoreWriter(root, tiny.spec(), tiny.codec("fp16")) as writer:
            writer.expire([keys[number]])
            for key in keys:
                if key not in writer.done:
                    writer.write(key, len(key), tiny.features(key))
        assert FeatureStore(root).verify() == [] and FeatureStore(root).keys == keys


def test_several_processes_do_not_renew(tmp_path: Path, tiny) -> None:
    tiny.write(tmp_path, ["a", "b"])
    with FeatureStoreWriter(tmp_path, tiny.spec(), tiny.codec("fp16"), 1, 2) as writer:
        writer.expire([])
        with pytest.raises(ValueError, match="by a single process"):
            writer.expire(["a"])
