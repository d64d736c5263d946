"""The detection job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...checkpoints.loading import model_kinds
from ...checkpoints.report import MergeReport
from ...checkpoints.words import Words
from ...config import Run
from ...data.layouts import data_kind
from ...dist import default_device
from ...engine.task import Task
from ...evaluation.concept_result import ConceptResult
from ...sandbox.concepts import PHRASES
from ...sandbox.render import render_sandbox
from ...students import EfficientSam3Config
from ...types import UserError
from ..base import DISTILLED, TEACHER, UNTRAINED, Evaluated, Given, Job, Plan, Ready, ReportNames
from ..caching import CacheCall, CacheReport
from ..recording import write_records
from ..views import ViewMaps
from .config import DetectionRunConfig
from .evaluate import evaluate
from .parts import DetectionParts
from .plan import plan_detection
from .student import KINDS
from .words import text_run


class DetectionJob(Job[DetectionRunConfig]):
    """A student learns the answers of a SAM 3 to questions, and its features."""

    name = "detection"
    phrases = PHRASES
    config = DetectionRunConfig
    unmeasured = "the images have no masks with names; set evaluate.concepts to a SA-Co file, or give COCO data"

    def plan(self, config: DetectionRunConfig, world: int = 1) -> Plan:
        return plan_detection(config)

    def words(self, config: DetectionRunConfig) -> Words:
        return DetectionParts(config).words

    def prepare(self, config: DetectionRunConfig, device: str) -> Ready:
        if default_device().type == "cpu" and config.train.precision != "fp32" and config.questions.boxes:
            raise UserError(
                f"train.precision={config.train.precision}: on the CPU boxes are pooled in float32 alone; "
                "set train.precision=fp32 (it is faster here too) or questions.boxes=0"
            )
        parts = DetectionParts(config)
        return Ready(parts.task(), parts.words)

    def probe(self, config: DetectionRunConfig, device: str) -> tuple[Task[Any], int]:
        return super().probe(DetectionParts(config).checkable().config, device)

    def before(self, config: DetectionRunConfig) -> tuple[Run, ...]:
        run = text_run(config)
        return () if run is None else (run,)

    def reads_cache(self, config: DetectionRunConfig) -> bool:
        return not config.online

    def cache(self, config: DetectionRunConfig, call: CacheCall) -> CacheReport:
        return write_records(ViewMaps(DetectionParts(config), call), call)

    def evaluate(self, config: DetectionRunConfig, merged: MergeReport | None) -> Evaluated | None:
        result = evaluate(config)
        return None if result is None else Evaluated(result)

    def summary(self, evaluated: Evaluated) -> list[str]:
        result = evaluated.result
        assert isinstance(result, ConceptResult)
        student, start, teacher = result.row(DISTILLED), result.row(UNTRAINED), result.row(TEACHER)
        kept = f"{student.kept:.1%} of " if student.kept is not None else ""
        return [
            f"cgF1: the student's {student.cgf1:.3f} is {kept}the teacher's {teacher.cgf1:.3f} "
            f"(untrained {start.cgf1:.3f})"
        ]

    def report_names(self, config: DetectionRunConfig) -> ReportNames:
        title = f"{KINDS[config.student.kind].title} on {config.student.backbone} from {Path(config.teacher.path).name}"
        return ReportNames(title, cached="levels of the teacher's pyramid")

    def demo(self, folder: Path) -> tuple[str, list[str]]:
        render_sandbox(folder, format="coco")
        settings = ["student.text_recipe=text/sandbox", "student.text_phrases=[sandbox]"]
        return "detection/hosted_sandbox", [f"data.root={json.dumps(str(folder))}", *settings]

    def begin(self, given: Given) -> tuple[str, list[str]]:
        kind = data_kind(given.data)
        settings = [
            f"teacher.path={json.dumps(given.teacher)}", "teacher.image_size=null", f"data.kind={kind}",
            f"data.root={json.dumps(str(given.data))}", "data.held_out=val", "data.held_out_last=null",
            "data.workers=2",
        ]  # fmt: skip
        named = kind == "coco"  # its categories have names; other images have no phrases for a small text encoder
        settings += ["questions.source=" + ("names" if named else "generic"), "questions.file=null"]
        if kind == "folder":
            settings.append("questions.boxes=0")  # nothing is annotated
        recipe = "detection/hosted"
        if given.student is not None and (place := Path(given.student).expanduser()).exists():
            settings.append(f"student.start={json.dumps(given.student)}")
            kinds = model_kinds(place)
            if EfficientSam3Config.model_type in kinds.values():
                return "detection/efficient_sam3", settings
            if kinds:
                settings.append(f"student.host={json.dumps(str(next(iter(kinds))))}")
            named = False
        elif given.student is not None:
            settings.append(f"student.backbone={json.dumps(given.student)}")
        return recipe, settings if named else [*settings, "student.text_recipe=null"]

    def train_items(self, config: DetectionRunConfig) -> int:
        return len(DetectionParts(config).train_source.keys)
