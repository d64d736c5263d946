"""What a run of the pipeline returns, and the contents of its report."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoints.report import MergeReport
from .config import Run
from .dist import default_device
from .engine import CheckReport, FitResult, read_lines
from .evaluation.verdict import Circumstances, verdict
from .jobs import JOBS
from .jobs.base import Evaluated, Plan
from .jobs.caching import CacheReport
from .report import CacheFacts, EarlierRun, MergeGroup, ReportData, describe_machine

if TYPE_CHECKING:
    from .deployment.record import Exported


REPORT, SUMMARY = "report.html", "summary.txt"
"""Files of a run folder: the page, and the main figures of a finished run in words."""


@dataclass(frozen=True)
class Earlier:
    """A finished run that another one needed.

    Attributes:
        job: Name of its job.
        folder: Its run folder.
        figures: Its ``RunResult.figures``.
    """

    job: str
    folder: Path
    figures: tuple[str, ...]


@dataclass(frozen=True)
class RunResult:
    """Results of the stages of a run, and the path of its HTML report. None: the stage is not part of the run."""

    config: Run
    planned: Plan
    cached: CacheReport | None
    checked: CheckReport
    trained: FitResult
    merged: MergeReport | None
    evaluated: Evaluated | None
    exported: Exported | None
    report: Path
    earlier: tuple[Earlier, ...] = ()

    @property
    def verdict(self) -> str:
        """A sentence that says whether the student improved. Empty if the run has no evaluation."""
        if self.evaluated is None:
            return ""
        result, names = self.evaluated.result, JOBS[self.config.job].report_names(self.config)
        scores = {name: result.score(name) for name in result.names}
        student = scores.get(names.student)
        if student is None:
            return ""
        train = self.config.train
        share = 1.0 if train.lr_batch is None or train.phases is not None else train.batch_size / train.lr_batch
        about = Circumstances(self.planned.steps, self.planned.inputs, share)
        teacher = scores.get(result.teacher) if result.teacher is not None else None
        return verdict(student, scores.get(names.start), teacher, about)

    def figures(self) -> list[str]:
        """Return the verdict and the main figures. The list is empty if the run has no evaluation."""
        lines = [] if self.evaluated is None else JOBS[self.config.job].summary(self.evaluated)
        return [self.verdict, *lines] if self.verdict else lines

    def summary(self) -> str:
        """Return the last lines of a run: verdict, figures, and the paths of the model and the report."""
        lines = self.figures()
        lines.append(f"student: {self.trained.student}" if self.merged is None else f"merged model: {self.merged.out}")
        if self.exported is not None:
            lines.append(f"exported: {self.exported.summary()}")
        notes = () if self.evaluated is None else self.evaluated.notes
        return "\n".join([*lines, *notes, f"report: {self.report}"])


def report_of(result: RunResult) -> ReportData:
    """Collect the contents of the HTML report."""
    config, cached, merged = result.config, result.cached, result.merged
    names, raw = JOBS[config.job].report_names(config), result.planned.raw_record_bytes
    facts = None
    if cached is not None and raw is not None:
        facts = CacheFacts(
            cached.records, cached.codec, cached.bytes_per_record, raw, cached.seconds if cached.written else None,
            names.cached, names.record,
        )  # fmt: skip
    return ReportData(
        title=names.title, student=names.student, start=names.start,
        evaluation=None if result.evaluated is None else result.evaluated.result, check=result.checked.terms,
        verdict=result.verdict,
        earlier=[EarlierRun(one.job, one.figures, f"{one.folder.name}/{REPORT}") for one in result.earlier],
        history=read_lines(config.output / "metrics.jsonl"), cache=facts,
        merge=[MergeGroup(name, t["tensors"], t["elements"]) for name, t in (merged.totals.items() if merged else ())],
        merged="" if merged is None else merged.out, exported=() if result.exported is None else result.exported.rows(),
        skipped={"cache": cached.skipped if cached else []},
        seconds=({"cache": cached.seconds} if cached else {}) | {"train": result.trained.seconds},
        config=config.to_yaml(), machine=describe_machine(str(default_device())),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
