"""Every job in tiny, behind one door: its config, and its task as the verbs build it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samdistill.config import Run
from samdistill.engine.task import Task
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.encoder.parts import EncoderParts
from samdistill.jobs.prompt.config import PromptRunConfig
from samdistill.jobs.prompt.parts import PromptParts
from samdistill.jobs.text.config import TextRunConfig
from samdistill.jobs.text.parts import TextParts
from samdistill.jobs.video.config import VideoRunConfig
from samdistill.jobs.video.job import video_task
from samdistill.jobs.video.parts import VideoParts
from samdistill.pipeline import cache

TinyJob = Callable[..., Run]
VIDEO_TERMS = "mask, box_l1, giou, iou, presence, select"
SETTINGS = {
    "encoder": ("train.batch_size=8", "train.epochs=1"),
    "detection": (
        "train.batch_size=16", "questions.boxes=0.4", "loss.label_dice=5.0", "loss.label_score=2.0",
        "loss.label_presence=1.0",
        "train.phases=[{name: align, epochs: 1, lr: 1e-3, terms: [fpn]}, {name: features, epochs: 1, lr: 1e-3}]",
    ),
    "hosted": (
        "train.batch_size=16", "questions.boxes=0.4",
        "train.phases=[{name: trunk, epochs: 1, lr: 1e-3, terms: [trunk]}, {name: features, epochs: 1, lr: 1e-3}]",
    ),
    "prompt": (
        "data.fraction=0.35", "train.epochs=1", "prompts.rounds=1", "prompts.click=random", "prompts.mode=mixed",
        "loss.bce=1.0",
    ),
    "video": (
        "train.batch_size=8", "student.memory.level=3",
        f"train.phases=[{{name: align, epochs: 1, lr: 1e-3, terms: [align]}}, "
        f"{{name: memory, epochs: 1, lr: 1e-3, terms: [{VIDEO_TERMS}]}}]",
    ),
    "text": ("train.batch_size=36", "train.epochs=1"),
}  # fmt: skip
"""Two or three steps, of all terms of the job."""


@pytest.fixture(scope="session")
def tiny_job(recipe, cached, detection, hosted, prompted, sams, video, text, tmp_path_factory) -> TinyJob:
    """tiny_job(job, output, *overrides): a config of that job, whose cache is there. ``hosted`` is a detection job."""
    films = video(tmp_path_factory.mktemp("films"), *SETTINGS["video"])
    words = text(tmp_path_factory.mktemp("words"), *SETTINGS["text"])
    for config in (films, words):
        cache(config, device="cpu", progress=False)
    make: dict[str, tuple[Callable[..., Run], tuple[str, ...]]] = {
        "encoder": (recipe, (f"cache.root={cached.store_root}",)),
        "detection": (detection, ()),
        "hosted": (hosted, ()),
        "prompt": (prompted, (f"student.start={sams['mobile']}",)),
        "video": (video, (f"cache.root={films.store_root}",)),
        "text": (text, (f"cache.root={words.store_root}",)),
    }

    def build(job: str, output: Path, *overrides: str) -> Run:
        recipe_of, needed = make[job]
        return recipe_of(output, *needed, *SETTINGS[job], "train.log_every=1", *overrides)

    return build


def task_of(config: Run) -> Task[Any]:
    """As ``samdistill train`` builds it, without opening a teacher again to prove a cache."""
    if isinstance(config, DetectionRunConfig):
        return DetectionParts(config).task(proven=False)
    if isinstance(config, PromptRunConfig):
        return PromptParts(config).task("cpu")
    if isinstance(config, VideoRunConfig):
        return video_task(VideoParts(config), prove_teacher=False)
    if isinstance(config, TextRunConfig):
        return TextParts(config).task(proven=False)
    parts = EncoderParts(config)
    return parts.task(parts.signals(proven=False))
