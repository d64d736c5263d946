"""``samdistill demo --job video``: plan, cache, check, train, evaluate, predict, report; resumable as a whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from ..config import VideoRunConfig, load_config
from ..data.skipped import reporting
from ..engine import CheckReport, FitResult, default_device
from ..evaluation.clip_scores import LOOKALIKES, ClipScores, Kind
from ..evaluation.clips import evaluate_clips
from ..evaluation.examples import evenly
from ..evaluation.video_pictures import Answers, film_picture, frame_pictures
from ..evaluation.video_result import STUDENT, TEACHER, WITHOUT, VideoResult
from ..evaluation.videos import evaluate_videos_with
from ..inference.concepts import StudentDetector, load_concept_model
from ..io import as_path, write_json
from ..locks import locked
from ..report import human_bytes
from ..teachers import LiveLevels, Sam3Detector
from ..types import UserError
from .cache import CacheReport, cache
from .evaluate_videos import RULES
from .predict_video import VideoPrediction, predict_video
from .progress import Progress
from .sandbox import render_sandbox
from .story import tell_video
from .train import check, train
from .video import VideoAssembly
from .video_task import plan_video

console = Console(soft_wrap=True, highlight=False)
SIZE = 126
"""Side of the demo's videos in pixels, which is that of the bundled student's canvas."""
FILM = "prediction.mp4"
MEMORIES: dict[str, Kind] = {WITHOUT: "none", STUDENT: "own", TEACHER: "teacher"}
"""What is remembered in each row of the table."""


@dataclass(frozen=True)
class VideoRoad:
    """What a whole video run left behind. cached: None for a run that reads none of the teacher's maps."""

    config: VideoRunConfig
    checked: CheckReport
    cached: CacheReport | None
    trained: FitResult
    evaluated: VideoResult
    predicted: VideoPrediction
    report: Path

    def summary(self) -> str:
        """The few lines a person wants to read at the end."""
        rows = {name: self.evaluated.row(name).jf for name in MEMORIES}
        lines = [
            f"J&F of objects that are followed: {rows[STUDENT]:.3f} (without memory {rows[WITHOUT]:.3f}, with the "
            f"teacher's maps {rows[TEACHER]:.3f})"
        ]
        alike = {name: self.evaluated.clips[name].summary(LOOKALIKES) for name in MEMORIES}
        if all(alike.values()):
            own, without, theirs = (alike[name]["jf"] for name in (STUDENT, WITHOUT, TEACHER))
            lines.append(
                f"J&F of look-alikes, frame by frame: {own:.3f} (without memory {without:.3f}, with the teacher's maps "
                f"{theirs:.3f})"
            )
        drawn = f"{self.predicted.out}, {self.predicted.text!r} followed"
        return "\n".join([*lines, f"student: {self.trained.student}", f"film: {drawn}", f"report: {self.report}"])


def demo_video(out: str | Path, *, overrides: Sequence[str] = ()) -> VideoRoad:
    """The video job on the sandbox: rendered videos, the bundled detector and its bundled student; minutes."""
    out = as_path(out)
    data = out / "data"
    with locked(out, "demo"):
        console.print("[bold]render[/]  videos with masks and words, SA-V layout")
        render_sandbox(data, format="sav", size=SIZE)
        settings = [f"output={json.dumps(str(out / 'run'))}", f"data.root={json.dumps(str(data))}"]
        config = load_config("video/sandbox", [*settings, *overrides])
        assert isinstance(config, VideoRunConfig)
        return walk_video(config)


def walk_video(config: VideoRunConfig) -> VideoRoad:
    """All stages of one config. Each looks at what is there and does only what is missing."""
    parts = VideoAssembly(VideoAssembly(config).resolved)  # one image student from here on
    config, found, cached = parts.config, plan_video(parts), None
    out, trained_params = config.output, sum(found.parts.values())
    console.print(
        f"[bold]plan[/]    {trained_params / 1e6:.2f}M parameters to train in a student of "
        f"{found.student_params / 1e6:.2f}M; {found.videos} videos, {human_bytes(found.cache_bytes)} of cache, "
        f"{found.steps} steps"
    )
    if found.steps == 0:
        raise UserError(f"{found.trained_on} are less than one batch: lower train.batch_size")
    if parts.reads_teacher:
        console.print("[bold]cache[/]   the teacher's maps, one a frame")
        cached = cache(config)
        console.print(f"        {cached.records} records, {human_bytes(cached.bytes)}, {len(cached.skipped)} skipped")
    checked = check(config)
    for phase in dict.fromkeys(term.phase for term in checked.terms):
        terms = ", ".join(f"{term.name} {term.grad_norm:.3g}" for term in checked.terms if term.phase == phase)
        console.print(f"[bold]check[/]   gradient norm at the memory, {phase or 'all terms'}: {terms}")
    if not checked.ok:
        raise UserError("; ".join(checked.problems))
    console.print("[bold]train[/]   the memory on masks; first it remembers the teacher's maps, then the student's own")
    trained = train(config)
    console.print("[bold]evaluate[/] on held-out videos")
    with reporting("evaluate", out):
        evaluated, predicted = evaluate_road(config)
    write_json(out / "evaluation.json", evaluated.to_dict(), indent=1)
    console.print(evaluated.table())
    report = tell_video(config, found, checked, cached, trained, evaluated)
    return VideoRoad(config, checked, cached, trained, evaluated, predicted, report)


def evaluate_road(config: VideoRunConfig) -> tuple[VideoResult, VideoPrediction]:
    """The student of a finished run with each memory: videos followed, single frames asked about, and one film."""
    parts, device = VideoAssembly(config), default_device()
    source, settings = parts.held_out_source, config.evaluate
    student, teacher = load_concept_model(config.output, device=device), parts.teacher(device)
    assert isinstance(student, StudentDetector)
    keys = evenly(source.keys, settings.videos)
    with Progress("following", len(keys), "videos") as bar:
        followed = evaluate_videos_with(
            student, source, keys, convention=RULES[settings.convention], teacher=teacher,
            geometry=config.data.geometry, workers=max(1, config.data.workers), progress=bar.advance,
        )  # fmt: skip
    clips, found = _single_frames(parts, student, teacher)
    pictures = frame_pictures(source, clips, found)
    console.print("[bold]predict[/] what a phrase names, through a whole video")
    answers = clips[STUDENT].answers
    about = next((answer for answer in answers if LOOKALIKES in answer.groups), answers[0])
    film = config.output / FILM
    predicted = predict_video(
        source.path(about.key), student, about.phrase, geometry=config.data.geometry, out=film
    )  # fmt: skip
    pictures.append(film_picture(film, about.key, about.phrase))
    skipped = tuple(dict.fromkeys((*followed.skipped, *(bad for each in clips.values() for bad in each.skipped))))
    return replace(followed, clips=clips, pictures=tuple(pictures), skipped=skipped), predicted


def _single_frames(
    parts: VideoAssembly, student: StudentDetector, teacher: Sam3Detector
) -> tuple[dict[str, ClipScores], dict[str, Answers]]:
    """Answers about frames of all held-out videos, and their masks, by row of the table."""
    source, settings = parts.held_out_source, parts.config
    place, size = parts.cached_view.geometry, settings.cache.batch_size
    theirs = LiveLevels(teacher, source, place, parts.level, size)
    clips, found = dict[str, ClipScores](), {name: Answers() for name in MEMORIES}
    with Progress("asking", len(MEMORIES) * len(source.keys), "videos") as bar:
        for name, memory in MEMORIES.items():
            clips[name] = evaluate_clips(
                student, source, source.keys, context=settings.clips.context, memory=memory,
                levels=theirs if memory == "teacher" else None, batch_size=size, geometry=settings.data.geometry,
                seen=found[name], progress=bar.advance,
            )  # fmt: skip
    return clips, found
