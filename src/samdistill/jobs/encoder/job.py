"""The encoder job, as the pipeline sees it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...checkpoints.report import MergeReport
from ...data.layouts import data_kind
from ...dist import default_device
from ...engine.task import Task
from ...evaluation import EvaluationResult
from ...io import write_text
from ...sandbox.render import render_sandbox
from ...store.spec import MANIFEST
from ...students import STUDENTS
from ...types import UserError
from ..base import CHECK_INPUTS, STUDENT, UNTRAINED, Evaluated, Job, Plan, Ready, ReportNames
from ..caching import CacheCall, CacheReport
from ..loading import load_config
from ..recording import write_records
from .cache import Embeddings
from .config import EncoderRunConfig
from .evaluate import evaluate, merge_student
from .parts import EncoderParts
from .plan import plan_encoder
from .task import EncoderTask


class EncoderJob(Job[EncoderRunConfig]):
    """A small trunk learns a SAM 3's cached image embeddings, and takes the place of its image encoder."""

    name = "encoder"
    config = EncoderRunConfig

    def plan(self, config: EncoderRunConfig, world: int = 1) -> Plan:
        return plan_encoder(config, world)

    def prepare(self, config: EncoderRunConfig, device: str) -> Ready:
        parts = EncoderParts(config)
        return Ready(parts.task(parts.proven_store()))

    def probe(self, config: EncoderRunConfig, device: str, trial: bool) -> tuple[Task[Any], int]:
        parts = EncoderParts(config)
        return _first_images(parts.task(parts.open_store() if trial else parts.proven_store())), CHECK_INPUTS

    def trial(self, config: EncoderRunConfig, folder: Path) -> EncoderRunConfig | None:
        if (config.store_root / MANIFEST).is_file():
            return None
        listing = folder / "ids.txt"
        write_text(listing, "\n".join(EncoderParts(config).train_source.keys[:CHECK_INPUTS]))
        data = config.data.model_copy(update={"ids": listing, "fraction": 1.0, "views": 1, "workers": 0})
        store = config.cache.model_copy(update={"root": folder / "store", "codec": "fp16"})
        return config.model_copy(update={"data": data, "cache": store})

    def reads_cache(self, config: EncoderRunConfig) -> bool:
        return True

    def cache(self, config: EncoderRunConfig, call: CacheCall) -> CacheReport:
        return write_records(Embeddings(config, call), call)

    def merge(self, config: EncoderRunConfig) -> MergeReport | None:
        return merge_student(config)

    def evaluate(self, config: EncoderRunConfig, merged: MergeReport | None) -> Evaluated | None:
        found = evaluate(config, merged)
        return None if found is None else Evaluated(found)

    def summary(self, evaluated: Evaluated) -> list[str]:
        result = evaluated.result
        assert isinstance(result, EvaluationResult)
        kept, start = result.row(STUDENT), result.row(UNTRAINED)
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

    def distil(self, data: Path, teacher: str, student: str, out: Path, overrides: Sequence[str]) -> EncoderRunConfig:
        recipe = f"encoder/{student}" if student in STUDENTS else "encoder/_base"
        settings = [
            f"output={json.dumps(str(out))}", f"teacher.path={json.dumps(teacher)}", f"student.backbone={student}",
            f"data.kind={data_kind(data)}", f"data.root={json.dumps(str(data))}", "data.fraction=1.0",
            "data.workers=2", "teacher.image_size=null",
        ]  # fmt: skip
        if default_device().type != "cuda":
            settings.append("train.precision=fp32")  # bf16 is slower than fp32 on most CPUs
        config = load_config(recipe, [*settings, *overrides])
        assert isinstance(config, EncoderRunConfig)
        return _fitted(config, overrides)


def _first_images(task: EncoderTask) -> EncoderTask:
    """The task on its first few images: a check needs a batch, not an epoch."""
    config, first = task.config, task.views[0]
    keys = first.keys[: min(CHECK_INPUTS, config.train.batch_size)]
    if len(keys) < 2:
        raise UserError(f"{config.data.root}: batch norm needs two readable images for a check, found {len(keys)}")
    view = type(first)(first.source, first.transform, keys, first.seed, first.view)
    return EncoderTask(config, task.teacher, task.store, [view])


def _fitted(config: EncoderRunConfig, overrides: Sequence[str]) -> EncoderRunConfig:
    """The published batch where there are images for it, else four steps an epoch; what the caller set stays.

    The published rate is linear in the batch, which starves a small folder; Adam's noise asks for the square root.
    """
    given = {text.partition("=")[0] for text in overrides}
    count = len(EncoderParts(config).train_source.keys)
    if count < 2:
        raise UserError(f"{config.data.root}: {count} image(s) to train on; give at least three, one is held out")
    settings = {}
    if "train.batch_size" not in given:
        settings["batch_size"] = min(config.train.batch_size, max(2, count // 4))
    if config.train.phases is not None:  # they have rates and warm-ups of their own
        return config.model_copy(update={"train": config.train.model_copy(update=settings)})
    if config.train.lr_batch is not None and not given & {"train.lr", "train.lr_batch"}:
        share = (settings.get("batch_size", config.train.batch_size) / config.train.lr_batch) ** 0.5
        rates = {name: getattr(config.train, name) * share for name in ("lr", "warmup_lr", "min_lr")}
        settings |= rates | {"lr_batch": None}
    if "train.warmup_epochs" not in given:
        settings["warmup_epochs"] = min(config.train.warmup_epochs, config.train.epochs / 10)
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})
