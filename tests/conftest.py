"""One small rendered world and what was made of it, for every test that needs images, a teacher and a cache."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from samdistill.config import RunConfig, load_config

Recipe = Callable[..., RunConfig]


@pytest.fixture(scope="session", autouse=True)
def sigint_is_heeded() -> Iterator[None]:
    """Tests and the processes they start get SIGINT, also where the suite itself was started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 held-out scenes as an SA-1B tree. Read only: copy it before you change it."""
    from samdistill.verbs.sandbox import render_sandbox

    root = tmp_path_factory.mktemp("world")
    render_sandbox(root, train=24, val=8, size=140, progress=False)
    return root


@pytest.fixture(scope="session")
def recipe(world: Path) -> Recipe:
    """recipe(output, *overrides): ``encoder/sandbox`` on the world, small."""

    def make(output: Path, *overrides: str) -> RunConfig:
        small = [
            f"output={output}", f"data.root={world}", "data.workers=0", "cache.batch_size=4", "train.batch_size=8",
            "train.epochs=2", "evaluate.images=8",
        ]  # fmt: skip
        return load_config("encoder/sandbox", [*small, *overrides])

    return make


@pytest.fixture(scope="session")
def cached(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose cache is complete: 24 records as fp16. Read only."""
    from samdistill.verbs.cache import cache

    config = recipe(tmp_path_factory.mktemp("cached"))
    cache(config, device="cpu", progress=False)
    return config
