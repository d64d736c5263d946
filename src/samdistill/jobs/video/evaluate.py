"""Evaluation of the student with its own memory, without memory, and with the teacher's maps, on held-out videos."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from ...data.sources import evenly
from ...dist import default_device
from ...evaluation.clip_scores import LOOKALIKES, ClipScores, Kind
from ...evaluation.clips import evaluate_clips
from ...evaluation.evaluate_videos import RULES
from ...evaluation.video_pictures import Answers, film_picture, frame_pictures
from ...evaluation.video_result import STUDENT, TEACHER, WITHOUT, VideoResult
from ...evaluation.videos import evaluate_videos_with
from ...inference.concepts import StudentDetector, load_concept_model
from ...inference.predict_video import VideoPrediction, predict_video
from ...progress import Progress
from ...teachers import RunningFrames, Sam3Detector
from .config import VideoRunConfig
from .parts import VideoParts

console = Console(soft_wrap=True, highlight=False)
FILM = "prediction.mp4"
MEMORIES: dict[str, Kind] = {WITHOUT: "none", STUDENT: "own", TEACHER: "teacher"}
"""Memory of each row of the table."""


def evaluate(config: VideoRunConfig) -> tuple[VideoResult, VideoPrediction]:
    """Evaluate a trained student with each memory on whole videos and on single frames, and render one video."""
    parts, device = VideoParts(config), default_device()
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
    parts: VideoParts, student: StudentDetector, teacher: Sam3Detector
) -> tuple[dict[str, ClipScores], dict[str, Answers]]:
    """Return the answers about frames of all held-out videos, and their masks, by row of the table."""
    source, settings = parts.held_out_source, parts.config
    place, size = parts.cached_view.geometry, settings.cache.batch_size
    theirs = RunningFrames(teacher, source, place, parts.level, size)
    clips, found = dict[str, ClipScores](), {name: Answers() for name in MEMORIES}
    with Progress("asking", len(MEMORIES) * len(source.keys), "videos") as bar:
        for name, memory in MEMORIES.items():
            clips[name] = evaluate_clips(
                student, source, source.keys, context=settings.clips.context, memory=memory,
                levels=theirs if memory == "teacher" else None, batch_size=size, geometry=settings.data.geometry,
                seen=found[name], progress=bar.advance,
            )  # fmt: skip
    return clips, found
