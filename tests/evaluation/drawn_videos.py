"""Videos from memory whose every frame says which one it is, and a stand-in for a student that answers about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from samdistill.checkpoints.words import Words
from samdistill.data.videos import BadVideo, VideoRecord, VideoSource
from samdistill.sandbox.concepts import CONTEXT, build_tokenizer

SIZE = (32, 64)
WORDS = Words(build_tokenizer(), CONTEXT)


class Drawn(VideoSource):
    """A BadVideo in place of masks is raised by the record. Frame i of a video is grey of level ``grey(key, i)``."""

    def __init__(self) -> None:
        self.keys, self.problems = [], []
        self.records: dict[str, VideoRecord | BadVideo] = {}
        self.truth: dict[str, np.ndarray] = {}
        self.read: list[tuple[str, int]] = []
        self.broken: set[tuple[str, int]] = set()

    def add(
        self, key: str, masks: np.ndarray, stride: int = 4, concepts: Sequence[Sequence[str]] = (),
        labelled: np.ndarray | None = None, ids: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """masks: annotated frames, objects, height, width; every ``stride``-th frame is annotated."""
        rows, count = masks.shape[:2]
        visible = masks.any((2, 3))
        known = np.ones_like(visible) if labelled is None else labelled
        self.records[key] = VideoRecord(
            key, *SIZE, (rows - 1) * stride + 1, 24.0, tuple(range(0, rows * stride, stride)),
            tuple(range(10, 10 + count) if ids is None else ids), visible, known, tuple(map(tuple, concepts)),
        )  # fmt: skip
        self.truth[key] = masks
        self.keys = sorted(self.records)

    def grey(self, key: str, index: int) -> int:
        return (80 * self.keys.index(key) + index) % 256

    def path(self, key: str) -> Path:
        return Path("nowhere") / key

    def record(self, key: str) -> VideoRecord:
        found = self.records[key]
        if isinstance(found, BadVideo):
            raise found
        return found

    def frames(self, key: str, indices: Sequence[int]) -> np.ndarray:
        for index in indices:
            if (key, index) in self.broken:
                raise BadVideo(key, f"frame {index} is damaged")
        self.read += [(key, index) for index in indices]
        return np.stack([np.full((*SIZE, 3), self.grey(key, index), np.uint8) for index in indices])

    def masks(self, key: str, index: int) -> np.ndarray:
        return self.truth[key][self.record(key).row(index)].copy()


def boxes(*rows: Sequence[tuple[int, int, int, int] | None]) -> np.ndarray:
    """Masks of rectangles (left, top, right, bottom), None where an object is not visible; a row per frame."""
    found = np.zeros((len(rows), len(rows[0]), *SIZE), bool)
    for row, objects in enumerate(rows):
        for column, box in enumerate(objects):
            if box is not None:
                left, top, right, bottom = box
                found[row, column, top:bottom, left:right] = True
    return found


def settings(**changes: object) -> SimpleNamespace:
    """A student's configuration, as far as an evaluation reads it."""
    vision = SimpleNamespace(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5), fpn_hidden_size=2)
    config = SimpleNamespace(
        model_type="efficient_sam3", vision_config=vision, memory_latents=4, memory_level=3, memory_marks=True,
        memory_context=8, memory_stride=4,
        memory_phrase="object",
    )  # fmt: skip
    vars(config).update(changes)
    return config


class Plain:
    """A student of whom only the configuration, the words and the parameters are asked."""

    image_size, words = 64, WORDS

    def __init__(self, **changes: object) -> None:
        self.model = torch.nn.Linear(3, 5)
        self.model.config = settings(**changes)
