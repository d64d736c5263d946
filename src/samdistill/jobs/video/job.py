"""The video job, as the pipeline sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...checkpoints.report import MergeReport
from ...data import leave_out
from ...data.layouts import video_kind
from ...dist import process_rank
from ...engine.task import Task
from ...evaluation.clip_scores import LOOKALIKES
from ...evaluation.video_result import STUDENT, TEACHER, WITHOUT, VideoResult
from ...io import write_text
from ...sandbox.render import render_sandbox
from ...store.spec import MANIFEST
from ...teachers import CachedLevels
from ...types import UserError
from ..base import CHECK_INPUTS, Evaluated, Given, Job, Plan, Ready, ReportNames
from ..caching import CacheCall, CacheReport
from ..recording import write_records
from .cache import Levels, complete_videos, open_levels, prove
from .config import VideoRunConfig
from .evaluate import MEMORIES, evaluate
from .parts import VideoParts
from .plan import plan_video
from .task import VideoTask

SIZE = 126
"""Side of the demo's videos in pixels, which is that of the bundled student's canvas."""
CHECK_VIDEOS = 2


def video_task(parts: VideoParts, prove_teacher: bool = True) -> VideoTask:
    """The job on all its videos: those that are wholly cached, where the teacher's maps are read at all.

    prove_teacher: rank 0 opens the teacher and holds it against the cache.
    """
    _ = parts.student_config  # a student of another width is refused before the cache is looked for
    levels, keys = None, parts.train_source.keys
    if parts.reads_teacher:
        store = open_levels(parts)
        if prove_teacher and process_rank() == 0:
            prove(parts, store)
        keys, skipped = complete_videos(parts, store)
        leave_out(skipped, seen_by_all=True)
        levels = CachedLevels(store)
    held_out = parts.held_out_source
    return VideoTask(parts.config, parts.start, parts.words, parts.view, parts.train_source, keys, levels, held_out)


class VideoJob(Job[VideoRunConfig]):
    """A frozen detector gets a memory, from its teacher's cached maps and the masks of videos."""

    name = "video"
    config = VideoRunConfig

    def resolve(self, config: VideoRunConfig) -> VideoRunConfig:
        return VideoParts(config).resolved

    def frames(self, config: VideoRunConfig) -> int:
        return config.clips.context

    def plan(self, config: VideoRunConfig, world: int = 1) -> Plan:
        return plan_video(VideoParts(config))

    def prepare(self, config: VideoRunConfig, device: str) -> Ready:
        parts = VideoParts(config)
        return Ready(video_task(parts), parts.words)

    def probe(self, config: VideoRunConfig, device: str, trial: bool) -> tuple[Task[Any], int]:
        micro = config.train.batch_size // config.train.accumulate
        return video_task(VideoParts(config), not trial), max(1, min(CHECK_INPUTS, micro))

    def trial(self, config: VideoRunConfig, folder: Path) -> VideoRunConfig | None:
        parts = VideoParts(config)
        if not parts.reads_teacher or (config.store_root / MANIFEST).is_file():
            return None
        listing = folder / "ids.txt"
        write_text(listing, "\n".join(parts.train_source.keys[:CHECK_VIDEOS]))
        data = config.data.model_copy(update={"ids": listing, "fraction": 1.0, "workers": 0})
        store = config.cache.model_copy(update={"root": folder / "store", "codec": "fp16"})
        return config.model_copy(update={"data": data, "cache": store})

    def reads_cache(self, config: VideoRunConfig) -> bool:
        return VideoParts(config).reads_teacher

    def cache(self, config: VideoRunConfig, call: CacheCall) -> CacheReport:
        return write_records(Levels(config, call), call)

    def evaluate(self, config: VideoRunConfig, merged: MergeReport | None) -> Evaluated:
        result, predicted = evaluate(config)
        return Evaluated(result, (f"film: {predicted.out}, {predicted.text!r} followed",))

    def summary(self, evaluated: Evaluated) -> list[str]:
        result = evaluated.result
        assert isinstance(result, VideoResult)
        rows = {name: result.row(name).jf for name in MEMORIES}
        lines = [
            f"J&F of objects that are followed: {rows[STUDENT]:.3f} (without memory {rows[WITHOUT]:.3f}, with the "
            f"teacher's maps {rows[TEACHER]:.3f})"
        ]
        alike = {name: result.clips[name].summary(LOOKALIKES) for name in MEMORIES}
        if all(alike.values()):
            own, without, theirs = (alike[name]["jf"] for name in (STUDENT, WITHOUT, TEACHER))
            lines.append(
                f"J&F of look-alikes, frame by frame: {own:.3f} (without memory {without:.3f}, with the teacher's maps "
                f"{theirs:.3f})"
            )
        return lines

    def report_names(self, config: VideoRunConfig) -> ReportNames:
        start = config.student.start
        assert start is not None  # in a resolved config
        name = start.parent.name if start.name == "student" else start.name
        title = f"A memory for {name} from {Path(config.teacher.path).name}"
        return ReportNames(title, STUDENT, WITHOUT, "maps of the teacher", "frame")

    def demo(self, folder: Path) -> tuple[str, list[str]]:
        render_sandbox(folder, format="sav", size=SIZE)
        return "video/sandbox", [f"data.root={json.dumps(str(folder))}"]

    def begin(self, given: Given) -> tuple[str, list[str]]:
        kind = video_kind(given.data)
        if kind is None:
            raise UserError(f"{given.data}: no videos with masks here; give SA-V or DAVIS")
        settings = [
            f"teacher.path={json.dumps(given.teacher)}", "teacher.image_size=null", f"data.kind={kind}",
            f"data.root={json.dumps(str(given.data))}", "data.workers=2",
        ]  # fmt: skip
        if given.student is not None:
            settings.append(f"student.start={json.dumps(given.student)}")
        return "video/efficient_sam3", settings

    def train_items(self, config: VideoRunConfig) -> int:
        return len(VideoParts(config).train_source.keys) * config.clips.per_video
