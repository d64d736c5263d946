"""Reading: any world, hash collisions, damage named by key, processes and threads, many records."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import samdistill.store.reader as reader_module
import samdistill.store.spec as spec_module
import samdistill.store.writer as writer_module
from samdistill.store import FeatureStore, FeatureStoreWriter
from samdistill.store.spec import INDEX_DTYPE
from samdistill.types import UserError

KEYS = [f"photos/{i} Ä.jpg" for i in range(12)]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_reading_back_whatever_the_world(tiny, tmp_path, codec_name, world):
    for rank in range(world):
        tiny.write(tmp_path, KEYS[rank::world], codec_name, rank, world)
    store, codec = FeatureStore(tmp_path, tiny.spec(codec_name)), tiny.codec(codec_name)
    assert len(store) == 12 and store.spec == tiny.spec(codec_name)
    assert store.keys == list(store) == [key for rank in range(world) for key in KEYS[rank::world]]
    assert store.bytes_per_record == codec.record_bytes
    for key in KEYS:
        record = store.read(key)
        assert key in store and (record.key, record.seed) == (key, len(key))
        assert torch.equal(record.features, codec.decode(codec.encode(tiny.features(key))))
    assert not store.verify() and not store.problems


def test_batches_equal_single_reads(tiny, tmp_path, codec_name):
    tiny.write(tmp_path, KEYS, codec_name)
    store = FeatureStore(tmp_path)
    wanted = [KEYS[5], KEYS[0], KEYS[5]]
    seeds, features = store.read_batch(wanted)
    assert seeds.dtype == torch.int64 and seeds.tolist() == [len(key) for key in wanted]
    torch.testing.assert_close(features, torch.stack([store.read(key).features for key in wanted]))
    assert store.read_batch([])[1].shape == (0, *tiny.shape)


def test_negative_seeds(tiny, tmp_path):
    with FeatureStoreWriter(tmp_path, tiny.spec(), tiny.codec("fp16")) as writer:
        writer.write("a", -(2**31), tiny.features("a"))
    assert FeatureStore(tmp_path).read("a").seed == -(2**31)


def test_features_own_their_memory(tiny, tmp_path, codec_name):
    tiny.write(tmp_path, KEYS[:1], codec_name)
    store = FeatureStore(tmp_path)
    store.read(KEYS[0]).features.zero_()
    assert store.read(KEYS[0]).features.abs().sum() > 0 and not store.verify()


def test_missing_keys(tiny, tmp_path):
    tiny.write(tmp_path, KEYS)
    store = FeatureStore(tmp_path)
    for key in ("photos", KEYS[0][:-1], KEYS[0] + "\n", "", "\ud800"):
        assert key not in store
        with pytest.raises(UserError, match=r"no record of .* among 12"):
            store.read(key)
    assert 3 not in store


def test_file_names_that_are_not_utf8(tiny, tmp_path):
    key = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    tiny.write(tmp_path, [key])
    assert FeatureStore(tmp_path).keys == [key] and (tmp_path / "rank0-keys.txt").read_bytes() == b"caf\xe9.jpg\n"
    tiny.write(tmp_path, [key])
    assert FeatureStore(tmp_path).read(key).seed == len(key)


@pytest.mark.parametrize("hashes", [1, 3])
def test_hash_collisions(tiny, tmp_path, monkeypatch, hashes):
    for module in (spec_module, writer_module, reader_module):
        monkeypatch.setattr(module, "key_hash", lambda raw: len(raw) * 7 % hashes)
    keys = [f"{'x' * i}" for i in range(1, 40)]
    for rank in range(2):
        tiny.write(tmp_path, keys[rank::2], rank=rank, world=2)
    store = FeatureStore(tmp_path)
    assert all(store.read(key).seed == len(key) for key in keys) and "y" not in store
    for key in keys:
        torch.testing.assert_close(store.read(key).features, tiny.features(key).half().float())


@pytest.mark.parametrize("collide", [False, True])
def test_a_key_cached_by_two_ranks_is_named(tiny, tmp_path, monkeypatch, collide):
    if collide:
        for module in (spec_module, writer_module, reader_module):
            monkeypatch.setattr(module, "key_hash", lambda raw: 5)
    for rank, keys in enumerate((KEYS[:7], KEYS[6:])):
        tiny.write(tmp_path / str(rank), keys, rank=rank, world=2)
    for path in (tmp_path / "1").glob("rank1-*"):
        path.rename(tmp_path / "0" / path.name)
    with pytest.raises(UserError, match=r"'photos/6 Ä.jpg' was cached twice, in rank0-keys.txt and rank1-keys.txt"):
        FeatureStore(tmp_path / "0")


@pytest.mark.parametrize("seed", range(12))
def test_any_flipped_bit_of_the_values_is_found_by_key(tiny, tmp_path, codec_name, seed):
    tiny.write(tmp_path, KEYS, codec_name)
    store = FeatureStore(tmp_path)
    content = bytearray((tmp_path / "rank0-values.bin").read_bytes())
    place = int(np.random.default_rng(seed).integers(len(content)))
    content[place] ^= 1 << seed % 8
    (tmp_path / "rank0-values.bin").write_bytes(content)
    hurt = KEYS[place // store.bytes_per_record]
    store = FeatureStore(tmp_path)
    assert [(p.key, p.file) for p in store.verify()] == [(hurt, "rank0-values.bin")]
    with pytest.raises(UserError, match=f"'{hurt}': record damaged, its checksum does not match") as error:
        store.read(hurt)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    for key in set(KEYS) - {hurt}:
        store.read(key)


@pytest.mark.parametrize("seed", range(30))
def test_any_flipped_bit_of_index_or_keys_is_found_and_wrongs_no_other_record(tiny, tmp_path, seed):
    tiny.write(tmp_path, KEYS)
    generator = np.random.default_rng(seed)
    path = tmp_path / ("rank0-index.bin" if seed % 2 else "rank0-keys.txt")
    content = bytearray(path.read_bytes())
    place = int(generator.integers(len(content)))
    content[place] ^= 1 << int(generator.integers(8))
    path.write_bytes(content)
    store = FeatureStore(tmp_path)
    assert store.verify()
    served = 0
    for key in KEYS:
        try:
            record = store.read(key)
        except UserError as error:
            assert repr(key) in str(error)
            continue
        served += 1
        assert torch.equal(record.features, tiny.features(key).half().float())
    assert served >= len(KEYS) - 2


@pytest.mark.parametrize("cut", [1, 5, 123, 124, 125, 400, 12 * 124])
def test_truncated_values_are_named(tiny, tmp_path, cut):
    tiny.write(tmp_path, KEYS)
    size = FeatureStore(tmp_path).bytes_per_record
    assert size == 4 + 2 * 60
    path = tmp_path / "rank0-values.bin"
    path.write_bytes(path.read_bytes()[: 12 * size - cut])
    store = FeatureStore(tmp_path)
    lost = KEYS[12 - -(-cut // size) :]
    assert [problem.key for problem in store.problems] == lost == [problem.key for problem in store.verify()]
    for key in KEYS:
        if key in lost:
            with pytest.raises(UserError, match=f"'{key}': record truncated"):
                store.read(key)
        else:
            store.read(key)


def test_foreign_bytes_are_reported(tiny, tmp_path):
    tiny.write(tmp_path, KEYS)
    for name in ("rank0-values.bin", "rank0-index.bin", "rank0-keys.txt"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"junk")
    store = FeatureStore(tmp_path)
    assert [str(problem) for problem in store.problems] == [
        f"rank0-{name}: 4 bytes behind record 12, unfinished or foreign"
        for name in ("values.bin", "index.bin", "keys.txt")
    ]
    assert store.keys == KEYS


@pytest.mark.parametrize("name", ["rank0-values.bin", "rank0-index.bin", "rank0-keys.txt"])
def test_a_missing_file_is_named(tiny, tmp_path, name):
    tiny.write(tmp_path, KEYS)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name} missing"):
        FeatureStore(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no feature store here"),
        ("", "not readable"),
        ("[]", "not the manifest"),
        ('{"format": "samdistill-features", "version": 9}', "store format 9, this program reads format 1"),
        ('{"format": "samdistill-features", "version": 1}', "damaged"),
    ],
)
def test_bad_manifests(tiny, tmp_path, text, message):
    tiny.write(tmp_path, KEYS)
    path = tmp_path / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=message):
        FeatureStore(tmp_path)


def test_a_changed_or_lost_basis_is_found(tiny, tmp_path):
    tiny.write(tmp_path, KEYS, "pca3-int8")
    path = tmp_path / "codec.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="changed since the store was made"):
        FeatureStore(tmp_path)
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not the state of codec pca3-int8"):
        FeatureStore(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        FeatureStore(tmp_path)


def test_an_empty_store(tiny, tmp_path):
    tiny.write(tmp_path, [])
    store = FeatureStore(tmp_path)
    assert len(store) == 0 and store.keys == [] and "a" not in store and not store.verify()


def test_verify_reports_progress(tiny, tmp_path):
    tiny.write(tmp_path, KEYS)
    seen: list[tuple[int, int]] = []
    FeatureStore(tmp_path).verify(lambda done, total: seen.append((done, total)))
    assert seen == [(i, 12) for i in range(1, 13)]


class _Cached(Dataset):
    def __init__(self, store: FeatureStore, keys: list[str]) -> None:
        self.store, self.names = store, keys

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.store.read(self.names[index]).features


def test_loader_workers_read(tiny, tmp_path, codec_name):
    for rank in range(2):
        tiny.write(tmp_path, KEYS[rank::2], codec_name, rank, 2)
    store = FeatureStore(tmp_path)
    expected = torch.stack([store.read(key).features for key in KEYS])  # the maps are open when the workers fork
    batches = list(DataLoader(_Cached(store, KEYS), batch_size=5, num_workers=2))
    torch.testing.assert_close(torch.cat(batches), expected, rtol=0, atol=0)


def test_pickles_carry_no_maps(tiny, tmp_path):
    tiny.write(tmp_path, KEYS)
    store = FeatureStore(tmp_path)
    before = len(pickle.dumps(store))
    expected = store.read(KEYS[3])
    text = pickle.dumps(store)
    assert len(text) == before
    assert torch.equal(pickle.loads(text).read(KEYS[3]).features, expected.features)


def test_threads_read(tiny, tmp_path):
    tiny.write(tmp_path, KEYS)
    store = FeatureStore(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(store.read, KEYS * 20))
    for record in records:
        assert torch.equal(record.features, tiny.features(record.key).half().float())


def test_many_records_open_without_reading_them(tiny, tmp_path):
    """200,000 records whose values file is a hole: opening cannot depend on what it holds."""
    count = 200_000
    tiny.write(tmp_path, [])
    keys = [b"image_%07d" % i for i in range(count)]
    index = np.zeros(count, INDEX_DTYPE)
    index["key_hash"] = [spec_module.key_hash(key) for key in keys]
    index["key_end"] = 14 * np.arange(1, count + 1)
    index.tofile(tmp_path / "rank0-index.bin")
    (tmp_path / "rank0-keys.txt").write_bytes(b"\n".join(keys) + b"\n")
    with (tmp_path / "rank0-values.bin").open("wb") as file:
        file.truncate(count * 124)
    store = FeatureStore(tmp_path)
    assert len(store) == count and "image_0123456" in store and "image_0200000" not in store
    assert not store.problems  # every record in a hole is damaged: one that is read is named
    assert store.verify()
