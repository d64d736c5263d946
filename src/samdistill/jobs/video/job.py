"""The video job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.files import STUDENT_FOLDER
from ...checkpoints.report import MergeReport
from ...checkpoints.words import Words
from ...data import leave_out
from ...data.layouts import video_kind
from ...dist import process_rank
from ...engine.task import Task
from ...evaluation.clip_scores import LOOKALIKES
from ...evaluation.video_result import STUDENT, TEACHER, WITHOUT, VideoResult
from ...sandbox.concepts import PHRASES
from ...sandbox.render import render_sandbox
from ...teachers import FrameSignals, StoredMaps
from ...types import UserError
from ..base import CHECK_INPUTS, Evaluated, Given, Job, Plan, Ready, ReportNames
from ..caching import CacheCall, CacheReport, is_cached, open_stores, prove
from ..recording import write_records
from .cache import Levels, complete_videos
from .config import VideoRunConfig
from .evaluate import MEMORIES, evaluate
from .parts import VideoParts
from .plan import plan_video
from .task import VideoTask

SIZE = 126
"""Side of the demo's videos in pixels, equal to that of the bundled student's canvas."""


def video_task(parts: VideoParts, device: torch.device | str = "cpu", prove_teacher: bool = True) -> VideoTask:
    """Return the task on all training videos; with a cache, on those that are completely cached.

    Args:
        parts: Parts of the run.
        device: Device of a running teacher.
        prove_teacher: On rank 0, load the teacher and compare it with the cache.
    """
    _ = parts.image_student_config  # raises for a student of another width before the cache is opened
    config, source = parts.config, parts.train_source
    levels: FrameSignals | None = None
    keys = source.keys
    if parts.reads_teacher and config.online:
        levels = parts.running(device)
    elif parts.reads_teacher:
        (store,) = open_stores(config.store_root, parts.specs("")).values()
        if prove_teacher and process_rank() == 0:
            prove(config.store_root, parts.specs(parts.teacher().fingerprint))
        keys, skipped = complete_videos(parts, store)
        leave_out(skipped, seen_by_all=True)
        levels = StoredMaps.of_frames([store])
    return VideoTask(config, parts.start, parts.words, parts.view, source, keys, levels, parts.held_out_source)


class VideoJob(Job[VideoRunConfig]):
    """A frozen detector gets a memory, trained with its teacher's maps and the masks of videos."""

    name = "video"
    phrases = PHRASES
    config = VideoRunConfig

    def resolve(self, config: VideoRunConfig) -> VideoRunConfig:
        return VideoParts(config).resolved

    def frames(self, config: VideoRunConfig) -> int:
        return config.clips.context

    def plan(self, config: VideoRunConfig, world: int = 1) -> Plan:
        return plan_video(VideoParts(config))

    def words(self, config: VideoRunConfig) -> Words:
        return VideoParts(config).words

    def prepare(self, config: VideoRunConfig, device: str) -> Ready:
        parts = VideoParts(config)
        return Ready(video_task(parts, device), parts.words)

    def probe(self, config: VideoRunConfig, device: str) -> tuple[Task[Any], int]:
        micro, parts = config.train.batch_size // config.train.accumulate, VideoParts(config)
        if not is_cached(config.store_root, parts.specs("")):
            parts = VideoParts(config.run_online())
        return video_task(parts, device), max(1, min(CHECK_INPUTS, micro))

    def reads_cache(self, config: VideoRunConfig) -> bool:
        return VideoParts(config).reads_teacher and not config.online

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
        assert start is not None  # the config is resolved
        name = start.parent.name if start.name == STUDENT_FOLDER else start.name
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
