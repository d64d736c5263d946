"""A text job of seconds: a random teacher that reads the sandbox's words, and a very small text encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from samdistill.jobs.loading import load_config
from samdistill.jobs.text.config import TextRunConfig

Recipe = Callable[..., TextRunConfig]


@pytest.fixture(scope="session")
def text(detector: tuple[object, Path]) -> Recipe:
    """text(output, *overrides): ``text/sandbox`` with the tiny models."""

    def make(output: Path, *overrides: str) -> TextRunConfig:
        small = [
            f"output={output}", f"teacher.path={detector[1]}", "data.passes=1", "data.composed=0",
            "train.batch_size=36", "student.size={hidden: 16, layers: 3, heads: 2, ffn: 16}", "train.epochs=2",
            "train.log_every=1", "train.warmup_epochs=0", "cache.verify_records=4",
        ]  # fmt: skip
        config = load_config("text/sandbox", [*small, *overrides])
        assert isinstance(config, TextRunConfig)
        return config

    return make
