"""The feature store compared with a memory map of the same bytes: writing, random reading, opening a million records.

    python benchmarks/store_io.py --out benchmarks/results/store_io.txt

Records have the size of SAM 3's trunk output at 1008 px (1024 x 72 x 72; 10.6 MB as fp16) and are filled with noise.
Each figure is the median of ``--repeats`` passes over all records. Random reads visit each record once, in shuffled
order, with a warm page cache. "cold" drops the page cache first (posix_fadvise) if the system supports it. Writing
includes the fsync of every batch and of the end. The memory map is also flushed (msync) at its end.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from common import Sheet, arguments, use_device

from samdistill.store import Codec, FeatureStore, FeatureStoreWriter, StoreSpec, make_codec
from samdistill.store.spec import INDEX_DTYPE, key_hash

MIB = 2**20
COLUMNS = ["what", "bytes a record", "write MiB/s", "random read MiB/s, warm", "cold", "ms a record, warm"]


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def drop_cache(path: Path) -> bool:
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def row(name: str, size: int, count: int, write: list[float], read: dict[str, list[float]]) -> list[str]:
    """One row of the table; MiB/s of bytes on disk, and milliseconds per record when reading warm."""
    rate = {what: size * count / MIB / statistics.median(times) for what, times in read.items()}
    written = f"{size * count / MIB / statistics.median(write):.0f}" if write else ""
    milliseconds = 1e3 * statistics.median(read["warm"]) / count
    cold = f"{rate['cold']:.0f}" if "cold" in rate else ""
    return [name, f"{size:,}", written, f"{rate['warm']:.0f}", cold, f"{milliseconds:.2f}"]


def time_reads(read: Callable[[], object], path: Path, repeats: int) -> dict[str, list[float]]:
    read()
    times = {"warm": [seconds(read) for _ in range(repeats)]}
    if drop_cache(path):
        times["cold"] = []
        for _ in range(repeats):
            drop_cache(path)
            times["cold"].append(seconds(read))
    return times


def time_map(folder: Path, maps: list[torch.Tensor], count: int, order: Iterable[int], repeats: int) -> list[str]:
    """Baseline: float16 maps in one np.memmap, no seed, no checksum, no key."""
    path, halves = folder / "plain.bin", [m.half().numpy() for m in maps]
    size = halves[0].nbytes

    def write() -> None:
        target = np.memmap(path, np.float16, "w+", shape=(count, *halves[0].shape))
        for number in range(count):
            target[number] = halves[number % len(halves)]
        target.flush()

    def read() -> None:
        source = np.memmap(path, np.float16, "r", shape=(count, *halves[0].shape))
        for number in order:
            np.array(source[number])

    writes = [seconds(write) for _ in range(repeats)]
    line = row("np.memmap, fp16 bytes", size, count, writes, time_reads(read, path, repeats))
    path.unlink()
    return line


def time_codec(
    folder: Path, codec: Codec, maps: list[torch.Tensor], count: int, order: Iterable[int], repeats: int
) -> list[list[str]]:
    spec = StoreSpec("image_embedding", codec.shape, 1008, "00", "00", codec.name)
    root, keys, order = folder / codec.name, [f"sa_{i}" for i in range(count)], list(order)

    def write() -> None:
        shutil.rmtree(root, ignore_errors=True)
        with FeatureStoreWriter(root, spec, codec) as writer:
            for number, key in enumerate(keys):
                writer.write(key, number, maps[number % len(maps)])

    writes = [seconds(write) for _ in range(repeats)]
    store, values = FeatureStore(root), root / "rank0-values.bin"
    payloads = time_reads(lambda: [store.read_payloads([keys[i]]) for i in order], values, repeats)
    decoded = time_reads(lambda: [store.read(keys[i]) for i in order], values, repeats)
    shutil.rmtree(root)
    return [
        row(f"store, {codec.name}: bytes, checksum verified", codec.record_bytes, count, writes, payloads),
        row(f"store, {codec.name}: decoded to float32", codec.record_bytes, count, [], decoded),
    ]


def time_opening(folder: Path, count: int, repeats: int) -> str:
    """A store of ``count`` records of 6 bytes over four ranks; the values are holes, which opening never reads."""
    root, ranks = folder / "million", 4
    spec, codec = StoreSpec("t", (1, 1, 1), 126, "00", "00", "fp16"), make_codec("fp16", (1, 1, 1))
    for rank in range(ranks):
        FeatureStoreWriter(root, spec, codec, rank, ranks).close()
        lines = [b"sa_%09d" % number for number in range(rank, count, ranks)]
        index = np.zeros(len(lines), INDEX_DTYPE)
        index["key_hash"] = [key_hash(line) for line in lines]
        index["key_end"] = 13 * np.arange(1, len(lines) + 1)
        index.tofile(root / f"rank{rank}-index.bin")
        (root / f"rank{rank}-keys.txt").write_bytes(b"\n".join(lines) + b"\n")
        os.truncate(root / f"rank{rank}-values.bin", len(lines) * codec.record_bytes)
    opening = [seconds(lambda: FeatureStore(root)) for _ in range(repeats)]
    store = FeatureStore(root)
    wanted = [f"sa_{number:09d}" for number in np.random.default_rng(0).integers(count, size=2000)]
    lookup = seconds(lambda: [key in store for key in wanted]) / len(wanted)
    assert len(store) == count and all(key in store for key in wanted)
    listing = seconds(lambda: store.keys)
    shutil.rmtree(root)
    return (
        f"Opening {count:,} records: {statistics.median(opening):.3f} s (worst of {repeats}: {max(opening):.3f} s); "
        f"finding a key: {lookup * 1e6:.0f} us; listing all keys: {listing:.2f} s."
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--records", type=int, default=64, help="records per store; 64 of fp16 take 680 MB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--codecs", default="fp16,int8,pca256-int8")
    parser.add_argument("--shape", default="1024,72,72")
    parser.add_argument("--million", type=int, default=1_000_000, help="records of the store that is opened")
    parser.add_argument("--dir", type=Path, help="where to write; the system's temporary folder by default")
    options = parser.parse_args()
    sheet = Sheet(use_device(options.device))
    channels, height, width = (int(n) for n in options.shape.split(","))
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(channels, height, width, generator=generator) for _ in range(4)]
    order = np.random.default_rng(0).permutation(options.records).tolist()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        rows.append(time_map(folder, maps, options.records, order, options.repeats))
        fits = []
        for codec_name in options.codecs.split(","):
            codec = make_codec(codec_name, (channels, height, width))
            fits.append(f"{codec_name} {seconds(lambda codec=codec: codec.fit(maps)):.2f} s")
            rows += time_codec(folder, codec, maps, options.records, order, options.repeats)
        size = f"{channels}x{height}x{width}"
        title = f"{options.records} records of {size}, median of {options.repeats} passes; MiB/s of bytes on disk"
        sheet.table(title, COLUMNS, rows)
        sheet.say()
        sheet.say(f"Fitting a codec on {len(maps)} maps: {', '.join(fits)}.")
        opening = time_opening(folder, options.million, options.repeats)
        sheet.say(opening)
    figures = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    sheet.save(options.out, {"rows": figures, "fitting": fits, "opening": opening})


if __name__ == "__main__":
    main()
