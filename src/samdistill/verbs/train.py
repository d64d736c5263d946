"""``samdistill train`` and ``samdistill check``: the engine over a config."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..checkpoints.words import Words
from ..config import AnyRun, DetectionRunConfig, PromptRunConfig, Run, RunConfig, VideoRunConfig
from ..data import reporting
from ..engine import CheckReport, FitResult, check_terms, default_device, fit, newest
from ..io import as_path, scratch, write_text
from ..locks import locked
from ..store.spec import MANIFEST
from ..tasks.base import Task
from ..tasks.encoder import EncoderTask
from ..types import UserError
from .assembly import Assembly
from .cache import cache
from .detection import DetectionAssembly
from .prompt import PromptAssembly, process_rank
from .video import VideoAssembly
from .video_task import video_task

CHECK_IMAGES, CHECK_VIDEOS = 4, 2
STUDENT = "student"


def train(config: AnyRun, *, resume: str | Path | None = None) -> FitResult:
    """Train the student of ``config``; the run folder is ``config.output``, and one process at a time writes it.

    The encoder job learns from its cached embeddings, the detection job from its teacher online, the prompt job from
    its teachers online or, with ``distillation.use_precomputed_features``, from its cache, the video job from masks and
    its teacher's cached maps. The same call goes on where an earlier one stopped, and leaves a finished run alone.
    resume: another run folder or checkpoint to start from. Raises UserError where the cache is absent, incomplete or
    foreign, where another process trains in the folder, where the folder holds a run with other settings or data, and
    on a non-finite loss.
    """
    start, started = None if resume is None else as_path(resume), newest(config.output) is not None
    with ExitStack() as stack:
        if process_rank() == 0:
            stack.enter_context(locked(config.output, "train"))
        stack.enter_context(reporting("train", config.output, process_rank(), resume=started))
        return _train(config, start)


def _train(config: AnyRun, resume: Path | None) -> FitResult:
    words: Words | None = None
    if isinstance(config, DetectionRunConfig):
        if default_device().type == "cpu" and config.train.precision != "fp32" and config.questions.boxes:
            raise UserError(
                f"train.precision={config.train.precision}: on the CPU boxes are pooled in float32 alone; "
                "set train.precision=fp32 (it is faster here too) or questions.boxes=0"
            )
        detection = DetectionAssembly(config)
        task: Task[Any] = detection.task()
        words = detection.words
    elif isinstance(config, VideoRunConfig):
        video = VideoAssembly(config)
        task, words, config = video_task(video), video.words, video.resolved
    elif isinstance(config, PromptRunConfig):
        task = PromptAssembly(config).task()
    else:
        parts = Assembly(config)
        task = parts.task(parts.proven_store())
    workers, resolved = config.data.workers, config.to_yaml()
    result = fit(task, config.train, config.output, resume=resume, workers=workers, resolved=resolved)
    if words is not None and process_rank() == 0:
        finish(config, words)
    return result


def finish(config: Run, words: Words) -> None:
    """The tokenizer beside the finished student: a folder that answers to words needs both."""
    folder = config.output / STUDENT
    if folder.is_dir():
        words.save(folder)


def check(config: AnyRun, *, device: str | None = None) -> CheckReport:
    """Each term's value, weight and gradient norm at the student on one real batch of every phase.

    The encoder and the video job use the run's cache where there is one; else a temporary cache of a few images, or of
    two videos, is made first.
    """
    with reporting("check"):
        return _check(config, device or str(default_device()))


def _check(config: AnyRun, device: str) -> CheckReport:
    if isinstance(config, VideoRunConfig):
        return _check_video(config, device)
    if not isinstance(config, RunConfig):
        micro = min(CHECK_IMAGES, config.train.batch_size // config.train.accumulate)
        online: Task[Any]
        if isinstance(config, PromptRunConfig):
            online = PromptAssembly(config).task(device)
        else:
            online = DetectionAssembly(config).task()
        return check_terms(online, device, max(1, micro), config.train.seed, config.train)
    if (config.store_root / MANIFEST).is_file():
        parts = Assembly(config)
        return check_terms(
            _small(parts.task(parts.proven_store()), config), device, seed=config.train.seed, train=config.train
        )
    with scratch() as folder:
        keys = Assembly(config).train_source.keys[:CHECK_IMAGES]
        listing = folder / "ids.txt"
        write_text(listing, "\n".join(keys))
        data = config.data.model_copy(update={"ids": listing, "fraction": 1.0, "views": 1, "workers": 0})
        store = config.cache.model_copy(update={"root": folder / "store", "codec": "fp16"})
        trial = config.model_copy(update={"data": data, "cache": store})
        cache(trial, device=device, progress=False)
        parts = Assembly(trial)
        task = _small(parts.task(parts.open_store()), trial)
        return check_terms(task, device, seed=config.train.seed, train=config.train)


def _check_video(config: VideoRunConfig, device: str) -> CheckReport:
    parts, micro = VideoAssembly(config), max(1, config.train.batch_size // config.train.accumulate)
    micro = min(CHECK_IMAGES, micro)
    if not parts.reads_teacher or (config.store_root / MANIFEST).is_file():
        return check_terms(video_task(parts), device, micro, config.train.seed, config.train)
    with scratch() as folder:
        listing = folder / "ids.txt"
        write_text(listing, "\n".join(parts.train_source.keys[:CHECK_VIDEOS]))
        data = config.data.model_copy(update={"ids": listing, "fraction": 1.0, "workers": 0})
        store = config.cache.model_copy(update={"root": folder / "store", "codec": "fp16"})
        trial = VideoAssembly(config.model_copy(update={"data": data, "cache": store}))
        cache(trial.config, device=device, progress=False)
        return check_terms(video_task(trial, False), device, micro, config.train.seed, config.train)


def _small(task: EncoderTask, config: RunConfig) -> EncoderTask:
    """The task on its first few images: a check needs a batch, not an epoch."""
    keys = task.views[0].keys[: min(CHECK_IMAGES, config.train.batch_size)]
    if len(keys) < 2:
        raise UserError(f"{config.data.root}: batch norm needs two readable images for a check, found {len(keys)}")
    first = task.views[0]
    return EncoderTask(
        config, task.teacher, task.store, [type(first)(first.source, first.transform, keys, first.seed, first.view)]
    )
