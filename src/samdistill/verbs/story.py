"""What a run hands to its report."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from ..checkpoints.report import MergeReport
from ..config import DetectionRunConfig, PromptRunConfig, RunConfig, VideoRunConfig
from ..engine import CheckReport, FitResult, default_device, read_lines
from ..evaluation import EvaluationResult
from ..evaluation.concepts import ConceptResult
from ..evaluation.video_result import STUDENT as FOLLOWING
from ..evaluation.video_result import WITHOUT, VideoResult
from ..report import CacheFacts, MergeGroup, ReportData, describe_machine, write_report
from ..store import record_bytes
from .cache import CacheReport
from .plan import Plan
from .video_task import VideoPlan

TEACHER, UNTRAINED, STUDENT = "teacher", "untrained", "distilled"
"""Names of the three models in every table of a run."""
UNTUNED = "untuned"
"""In the prompt job, the student that training started from."""


def tell(
    config: RunConfig, planned: Plan, checked: CheckReport, cached: CacheReport, trained: FitResult,
    merged: MergeReport | None, evaluated: EvaluationResult | None,
) -> Path:  # fmt: skip
    """Write ``report.html`` into the run folder."""
    groups = [] if merged is None else merged.totals.items()
    data = ReportData(
        title=f"{config.student.backbone} from {Path(config.teacher.path).name}",
        student=STUDENT, start=UNTRAINED, evaluation=evaluated, check=checked.terms,
        history=read_lines(config.output / "metrics.jsonl"),
        cache=CacheFacts(
            cached.records, config.cache.codec, cached.bytes_per_record, record_bytes("fp16", planned.embedding_shape),
            cached.seconds if cached.written else None,
        ),
        merge=[MergeGroup(name, t["tensors"], t["elements"]) for name, t in groups],
        merged="" if merged is None else merged.out,
        skipped={"cache": cached.skipped},
        seconds={"cache": cached.seconds, "train": trained.seconds},
        config=config.to_yaml(), machine=describe_machine(str(default_device())),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    return write_report(config.output / "report.html", data)


def tell_detection(
    config: DetectionRunConfig, checked: CheckReport, trained: FitResult, evaluated: ConceptResult
) -> Path:
    """The same for a detection run, which caches and merges nothing."""
    data = ReportData(
        title=f"EfficientSam3 on {config.student.backbone} from {Path(config.teacher.path).name}",
        student=STUDENT, start=UNTRAINED, evaluation=evaluated, check=checked.terms,
        history=read_lines(config.output / "metrics.jsonl"), seconds={"train": trained.seconds},
        config=config.to_yaml(), machine=describe_machine(str(default_device())),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    return write_report(config.output / "report.html", data)


def tell_prompt(
    config: PromptRunConfig, checked: CheckReport, trained: FitResult, evaluated: EvaluationResult
) -> Path:  # fmt: skip
    """The same for a prompt run."""
    start = config.student.start or config.student.backbone
    taught = ", ".join(teacher.name for teacher in config.teachers) if config.distilled else "masks alone"
    data = ReportData(
        title=f"{start} taught by {taught}", student=STUDENT, start=UNTUNED, evaluation=evaluated,
        check=checked.terms, history=read_lines(config.output / "metrics.jsonl"), seconds={"train": trained.seconds},
        config=config.to_yaml(), machine=describe_machine(str(default_device())),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    return write_report(config.output / "report.html", data)


def tell_video(
    config: VideoRunConfig, planned: VideoPlan, checked: CheckReport, cached: CacheReport | None, trained: FitResult,
    evaluated: VideoResult,
) -> Path:  # fmt: skip
    """The same for a video run. What its rows differ in is what is remembered, not the model."""
    start = config.student.start
    assert start is not None  # in a resolved config
    name = start.parent.name if start.name == "student" else start.name
    seconds = {"train": trained.seconds} if cached is None else {"cache": cached.seconds, "train": trained.seconds}
    facts = None if cached is None else CacheFacts(
        cached.records, config.cache.codec, cached.bytes_per_record, record_bytes("fp16", planned.record_shape),
        cached.seconds if cached.written else None, "maps of the teacher", "frame",
    )  # fmt: skip
    data = ReportData(
        title=f"A memory for {name} from {Path(config.teacher.path).name}",
        student=FOLLOWING, start=WITHOUT, evaluation=evaluated, check=checked.terms,
        history=read_lines(config.output / "metrics.jsonl"), cache=facts,
        skipped={"cache": [] if cached is None else cached.skipped}, seconds=seconds,
        config=config.to_yaml(), machine=describe_machine(str(default_device())),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    return write_report(config.output / "report.html", data)
