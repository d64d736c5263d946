"""Small stores: deterministic features by key, and the functions that write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from samdistill.store import Codec, FeatureStoreWriter, StoreSpec, make_codec

CODEC_NAMES = ("fp16", "fp32", "int8", "pca3-int8")
SHAPE = (5, 3, 4)


def _features(key: str, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    seed = sum(ord(letter) * 31**i for i, letter in enumerate(key)) % 2**32
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def _spec(codec: str = "fp16", shape: tuple[int, int, int] = SHAPE) -> StoreSpec:
    return StoreSpec("image_embedding", shape, 126, "aa11", "bb22", codec)


def _codec(name: str, shape: tuple[int, int, int] = SHAPE) -> Codec:
    codec = make_codec(name, shape)
    codec.fit([_features(f"sample{i}", shape) for i in range(4)])
    return codec


def _write(
    root: Path, keys: Sequence[str], codec: str = "fp16", rank: int = 0, world: int = 1, shape: tuple = SHAPE
) -> None:
    """Write ``keys`` as the cache does: in order, without those that are done; the seed is the key's length."""
    with FeatureStoreWriter(root, _spec(codec, shape), _codec(codec, shape), rank, world) as writer:
        for key in keys:
            if key not in writer.done:
                writer.write(key, len(key), _features(key, shape))


def _content(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


@pytest.fixture
def tiny() -> SimpleNamespace:
    """features(key), spec(codec), codec(name), write(root, keys, ...), content(root), shape."""
    table: dict[str, Callable] = {
        "features": _features,
        "spec": _spec,
        "codec": _codec,
        "write": _write,
        "content": _content,
    }
    return SimpleNamespace(shape=SHAPE, **table)


@pytest.fixture(params=CODEC_NAMES)
def codec_name(request: pytest.FixtureRequest) -> str:
    return request.param
