"""The prompt job."""

from __future__ import annotations

import json
from pathlib import Path

from ...checkpoints.files import PACKAGED
from ...checkpoints.report import MergeReport
from ...data.layouts import data_kind
from ...evaluation import EvaluationResult
from ...progress import Progress
from ...sandbox.scenes import SceneStyle
from ...sandbox.write import write_coco
from ..base import DISTILLED, TEACHER, Evaluated, Given, Job, Plan, Ready, ReportNames
from ..caching import CacheCall, CacheReport
from .cache import cache_signals
from .config import PromptRunConfig
from .evaluate import UNTUNED, evaluate
from .parts import PromptParts
from .plan import plan_prompt

WORLD = SceneStyle(max_objects=8, min_objects=3, min_radius=0.06, max_radius=0.16)
"""More and smaller objects than in the training of the sandbox models. The domains differ like a user's photographs and
SAM's training data.
"""
SCENES, SIZE, SEED = {"train": 384, "val": 64}, 168, 30


class PromptJob(Job[PromptRunConfig]):
    """A MobileSAM is fine-tuned on masks and on cached or online signals of one or several SAMs."""

    name = "prompt"
    config = PromptRunConfig
    layouts = ("store", "npy")

    def plan(self, config: PromptRunConfig, world: int = 1) -> Plan:
        return plan_prompt(config)

    def prepare(self, config: PromptRunConfig, device: str) -> Ready:
        return Ready(PromptParts(config).task(device))

    def reads_cache(self, config: PromptRunConfig) -> bool:
        return config.cached

    def cache(self, config: PromptRunConfig, call: CacheCall) -> CacheReport:
        return cache_signals(config, call)

    def evaluate(self, config: PromptRunConfig, merged: MergeReport | None) -> Evaluated:
        return Evaluated(evaluate(config))

    def summary(self, evaluated: Evaluated) -> list[str]:
        result = evaluated.result
        assert isinstance(result, EvaluationResult)
        tuned, start = result.row(DISTILLED), result.row(UNTUNED)
        teacher = next((row for row in result.rows if row.name == TEACHER), None)
        lines = []
        for kind, value in tuned.miou.items():
            theirs = f", its teacher {teacher.miou[kind]:.3f}" if teacher is not None else ""
            lines.append(f"{kind}: mIoU {value:.3f} (untuned {start.miou[kind]:.3f}{theirs})")
        return lines

    def report_names(self, config: PromptRunConfig) -> ReportNames:
        start = config.student.start or config.student.backbone
        taught = ", ".join(teacher.name for teacher in config.teachers) if config.distilled else "masks alone"
        return ReportNames(f"{start} taught by {taught}", start=UNTUNED)

    def demo(self, folder: Path) -> tuple[str, list[str]]:
        for seed, (split, count) in enumerate(SCENES.items(), SEED):
            with Progress(f"rendering {split}", count, "scenes") as bar:
                write_coco(folder, count, SIZE, seed, split, WORLD, progress=lambda done, _, bar=bar: bar.at(done))
        return "prompt/sandbox", [f"data.root={json.dumps(str(folder))}"]

    def begin(self, given: Given) -> tuple[str, list[str]]:
        student = given.student or "mobile_sam.pt"
        start = Path(student).expanduser().exists() or student in PACKAGED
        names = [Path(path).stem or path for path in given.teachers]
        teachers = [
            {"name": f"{n}-{name}" if names.count(name) > 1 else name, "checkpoint": path, "weight": weight}
            for n, (name, (path, weight)) in enumerate(zip(names, given.teachers.items(), strict=True))
        ]
        key = "start" if start or Path(student).suffix else "backbone"
        other = [] if key == "start" else ["student.start=null"]
        return "prompt/mobile_sam", [
            f"student.{key}={json.dumps(student)}", *other, f"teachers={json.dumps(teachers)}",
            f"data.kind={data_kind(given.data)}", f"data.root={json.dumps(str(given.data))}", "data.workers=2",
        ]  # fmt: skip

    def train_items(self, config: PromptRunConfig) -> int:
        return len(PromptParts(config).train_source.keys)
