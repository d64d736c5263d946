"""The text job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...checkpoints.merge import merge
from ...checkpoints.report import MergeReport
from ...checkpoints.words import Words
from ...engine.task import Task
from ...sandbox.concepts import PHRASES
from ...sandbox.render import render_sandbox
from ...types import UserError
from ..base import DISTILLED, TEACHER, UNTRAINED, Evaluated, Given, Job, Plan, Ready, ReportNames
from ..caching import CacheCall, CacheReport
from ..recording import write_records
from .cache import PhraseRecords
from .config import TextRunConfig
from .evaluate import evaluate
from .parts import TextParts
from .plan import plan_text
from .result import TextResult

SUFFIXES = ("*.txt", "*.jsonl", "*.json", "annotations/*.json")
"""Files of phrases in a folder that is given to ``run``."""


class TextJob(Job[TextRunConfig]):
    """A small text encoder learns the tokens of SAM 3's and replaces it."""

    name = "text"
    config = TextRunConfig
    phrases = PHRASES
    unmeasured = "no phrase was kept out of training; raise data.held_out_fraction, or list files in data.exclude"

    def plan(self, config: TextRunConfig, world: int = 1) -> Plan:
        return plan_text(config)

    def words(self, config: TextRunConfig) -> Words:
        return TextParts(config).words

    def prepare(self, config: TextRunConfig, device: str) -> Ready:
        parts = TextParts(config)
        return Ready(parts.task(), parts.words)

    def probe(self, config: TextRunConfig, device: str) -> tuple[Task[Any], int]:
        return super().probe(TextParts(config).checkable().config, device)

    def reads_cache(self, config: TextRunConfig) -> bool:
        return not config.online

    def cache(self, config: TextRunConfig, call: CacheCall) -> CacheReport:
        return write_records(PhraseRecords(TextParts(config), call), call)

    def merge(self, config: TextRunConfig) -> MergeReport | None:
        return merge(config.output, config.teacher.path, config.output / "merged")

    def evaluate(self, config: TextRunConfig, merged: MergeReport | None) -> Evaluated | None:
        result = evaluate(config, None if merged is None else merged.out)
        return None if result is None else Evaluated(result)

    def summary(self, evaluated: Evaluated) -> list[str]:
        result = evaluated.result
        assert isinstance(result, TextResult)
        student, start, teacher = result.row(DISTILLED), result.row(UNTRAINED), result.row(TEACHER)
        lines = [
            f"tokens: cosine {student.cosine:.3f} with the teacher's (untrained {start.cosine:.3f}), "
            f"{student.own_nearest:.1%} of the phrases are nearest to themselves"
        ]
        if student.cgf1_new is not None and student.kept_new is not None and teacher.cgf1_new is not None:
            lines.append(
                f"cgF1 on phrases not trained on: {student.cgf1_new:.3f} is {student.kept_new:.1%} of the teacher's "
                f"{teacher.cgf1_new:.3f}"
            )
        return lines

    def report_names(self, config: TextRunConfig) -> ReportNames:
        name = config.student.size if isinstance(config.student.size, str) else "own size"
        title = f"Text encoder ({name}) from {Path(config.teacher.path).name}"
        return ReportNames(title, cached="the teacher's tokens", record="phrase")

    def demo(self, folder: Path) -> tuple[str, list[str]]:
        render_sandbox(folder, train=1, format="coco")  # only the questions about held-out scenes are used
        return "text/sandbox", [f"evaluate.concepts={json.dumps(str(folder / 'concepts_val.json'))}"]

    def begin(self, given: Given) -> tuple[str, list[str]]:
        files = [given.data]
        if given.data.is_dir():
            files = sorted({path for pattern in SUFFIXES for path in given.data.glob(pattern)})
        if not files:
            raise UserError(f"{given.data}: no file of phrases in it ({', '.join(SUFFIXES)})")
        recipe, settings = "text/s0", [
            f"teacher.path={json.dumps(given.teacher)}", f"data.phrases={json.dumps([str(file) for file in files])}",
            "data.exclude=[]", "data.held_out_fraction=0.1", "data.workers=2",
        ]  # fmt: skip
        if given.student is not None:
            start = Path(given.student).expanduser().exists()
            settings.append(f"student.{'start' if start else 'size'}={json.dumps(given.student)}")
        return recipe, settings

    def train_items(self, config: TextRunConfig) -> int:
        return TextParts(config).items
