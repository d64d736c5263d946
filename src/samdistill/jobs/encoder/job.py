"""The encoder job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...checkpoints.report import MergeReport
from ...checkpoints.words import Words
from ...data.layouts import data_kind
from ...engine.task import Task
from ...evaluation import EvaluationResult
from ...inference.predict import answers_prompts
from ...sandbox.render import render_sandbox
from ...students import STUDENTS
from ...teachers import describe_detector, teacher_kind
from ...teachers.sam3_text import text_words
from ...types import UserError
from ..base import CHECK_INPUTS, DISTILLED, UNTRAINED, Evaluated, Given, Job, Plan, Ready, ReportNames
from ..caching import CacheCall, CacheReport
from ..recording import write_records
from ..views import ViewMaps
from .config import EncoderRunConfig
from .evaluate import evaluate, merge_student
from .parts import EncoderParts
from .plan import plan_encoder

GEOMETRIES = {"sam": "longest_side"}
"""Geometry of the images on which a kind of teacher was trained, if it is not ``square``."""


class EncoderJob(Job[EncoderRunConfig]):
    """A small trunk learns a SAM's cached or online image embeddings and replaces its image encoder."""

    name = "encoder"
    config = EncoderRunConfig

    def plan(self, config: EncoderRunConfig, world: int = 1) -> Plan:
        return plan_encoder(config, world)

    def words(self, config: EncoderRunConfig) -> Words | None:
        """The teacher's, if the trunk is merged into a detector."""
        if config.teacher.kind != "sam3" or answers_prompts(config.teacher.path):
            return None
        return text_words(config.teacher, describe_detector(config.teacher))

    def prepare(self, config: EncoderRunConfig, device: str) -> Ready:
        parts = EncoderParts(config)
        return Ready(parts.task(parts.signals()))

    def probe(self, config: EncoderRunConfig, device: str) -> tuple[Task[Any], int]:
        """Use the first few images only, because ``check`` needs one batch."""
        parts = EncoderParts(config).checkable()
        signals = parts.signals()
        keys = parts.trained_keys[: min(CHECK_INPUTS, config.train.batch_size)]
        if len(keys) < 2:
            raise UserError(f"{config.data.root}: batch norm needs two readable images for a check, found {len(keys)}")
        return parts.task(signals, keys), CHECK_INPUTS

    def reads_cache(self, config: EncoderRunConfig) -> bool:
        return not config.online

    def cache(self, config: EncoderRunConfig, call: CacheCall) -> CacheReport:
        return write_records(ViewMaps(EncoderParts(config), call), call)

    def merge(self, config: EncoderRunConfig) -> MergeReport | None:
        return merge_student(config)

    def evaluate(self, config: EncoderRunConfig, merged: MergeReport | None) -> Evaluated | None:
        found = evaluate(config, merged)
        return None if found is None else Evaluated(found)

    def summary(self, evaluated: Evaluated) -> list[str]:
        result = evaluated.result
        assert isinstance(result, EvaluationResult)
        kept, start = result.row(DISTILLED), result.row(UNTRAINED)
        if result.labelled:
            return [
                f"{kind}: the student keeps {share:.1%} of the teacher's mIoU (untrained {start.kept[kind]:.1%})"
                for kind, share in kept.kept.items()
            ]
        return [f"{kind}: mean IoU {value:.3f} with the teacher's own masks" for kind, value in kept.agreement.items()]

    def report_names(self, config: EncoderRunConfig) -> ReportNames:
        return ReportNames(f"{config.student.backbone} from {Path(config.teacher.path).name}")

    def demo(self, folder: Path) -> tuple[str, list[str]]:
        render_sandbox(folder)
        return "encoder/sandbox", [f"data.root={json.dumps(str(folder))}"]

    def begin(self, given: Given) -> tuple[str, list[str]]:
        student = given.student or "es_rv_m"
        recipe = f"encoder/{student}" if student in STUDENTS else "encoder/_base"
        kind = teacher_kind(given.teacher)
        return recipe, [
            f"teacher.kind={kind}", f"data.geometry={GEOMETRIES.get(kind, 'square')}",
            f"teacher.path={json.dumps(given.teacher)}", f"student.backbone={student}",
            f"data.kind={data_kind(given.data)}", f"data.root={json.dumps(str(given.data))}", "data.fraction=1.0",
            "data.workers=2", "teacher.image_size=null",
        ]  # fmt: skip

    def train_items(self, config: EncoderRunConfig) -> int:
        return len(EncoderParts(config).train_source.keys)
