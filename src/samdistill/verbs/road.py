"""``samdistill run`` and ``demo``: plan, cache, check, train, merge, evaluate, report; resumable as a whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import Sam3TrackerModel

from ..checkpoints.merge import merge
from ..checkpoints.promptable import load_model
from ..checkpoints.report import MergeReport
from ..config import RunConfig, load_config
from ..data import reporting
from ..engine import CheckReport, FitResult, default_device
from ..evaluation import EvaluationResult, evaluate_models
from ..io import as_path, write_json
from ..locks import locked
from ..report import human_bytes
from ..students import STUDENTS, build_trunk
from ..tasks.encoder import student_config
from ..types import UserError
from .assembly import Assembly
from .cache import CacheReport, cache
from .evaluate import data_kind
from .plan import plan_encoder
from .progress import Progress
from .sandbox import render_sandbox
from .story import STUDENT, TEACHER, UNTRAINED, tell
from .train import check, train

console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class RoadResult:
    """What a whole run left behind."""

    config: RunConfig
    checked: CheckReport
    cached: CacheReport
    trained: FitResult
    merged: MergeReport | None
    evaluated: EvaluationResult | None
    report: Path

    def summary(self) -> str:
        """The few lines a person wants to read at the end."""
        lines = []
        if self.evaluated is not None and self.evaluated.labelled:
            kept, start = self.evaluated.row(STUDENT), self.evaluated.row(UNTRAINED)
            lines += [
                f"{kind}: the student keeps {share:.1%} of the teacher's mIoU (untrained {start.kept[kind]:.1%})"
                for kind, share in kept.kept.items()
            ]
        elif self.evaluated is not None:
            lines += [
                f"{kind}: mean IoU {value:.3f} with the teacher's own masks"
                for kind, value in self.evaluated.row(STUDENT).agreement.items()
            ]
        if self.merged is not None:
            lines.append(f"merged model: {self.merged.out}")
        return "\n".join([*lines, f"report: {self.report}"])


def run(
    images: str | Path, teacher: str | Path, student: str, out: str | Path, *, overrides: Sequence[str] = ()
) -> RoadResult:
    """Distil ``teacher`` into ``student`` on the images of one folder, and show what came of it.

    images: any folder of images, an SA-1B tree or a COCO folder. teacher: a SAM 3 folder, hub id or sam3.pt, or
    ``sandbox``. student: es_rv_m and so on, or any timm backbone. overrides: ``key=value`` settings of the config.
    The same call goes on where an earlier one stopped.
    """
    if any(text.startswith("job=") for text in overrides):
        raise UserError(
            "job: `run` walks the encoder job; for detection use `train` with a config that extends detection/_base"
        )
    images, out = as_path(images), as_path(out)
    kind = data_kind(images)
    recipe = f"encoder/{student}" if student in STUDENTS else "encoder/_base"
    settings = [
        f"output={json.dumps(str(out))}", f"teacher.path={json.dumps(str(teacher))}", f"student.backbone={student}",
        f"data.kind={kind}", f"data.root={json.dumps(str(images))}", "data.fraction=1.0", "data.workers=2",
        "teacher.image_size=null",
    ]  # fmt: skip
    if default_device().type != "cuda":
        settings.append("train.precision=fp32")  # bf16 is slower than fp32 on most CPUs
    config = load_config(recipe, [*settings, *overrides])
    with locked(config.output, "run"):
        return walk(_fitted(config, overrides))


def _fitted(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The published batch where there are images for it, else four steps an epoch; what the caller set stays.

    The published rate is linear in the batch, which starves a small folder; Adam's noise asks for the square root.
    """
    given = {text.partition("=")[0] for text in overrides}
    count = len(Assembly(config).train_source.keys)
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


def demo(out: str | Path, *, overrides: Sequence[str] = ()) -> RoadResult:
    """The main job on the sandbox: rendered scenes, the bundled teacher, minutes on two cores."""
    out = as_path(out)
    data = out / "data"
    with locked(out, "demo"):
        console.print("[bold]render[/]  scenes in the SA-1B layout")
        render_sandbox(data)
        settings = [f"output={json.dumps(str(out / 'run'))}", f"data.root={json.dumps(str(data))}"]
        return walk(load_config("encoder/sandbox", [*settings, *overrides]))


def walk(config: RunConfig) -> RoadResult:
    """All stages of one config. Each looks at what is there and does only what is missing."""
    out = config.output
    found = plan_encoder(config)
    console.print(
        f"[bold]plan[/]    {found.student}: {(found.trunk_params + found.head_params) / 1e6:.2f}M parameters for "
        f"{found.teacher_trunk_params / 1e6:.2f}M; {found.images} images, {human_bytes(found.cache_bytes)} of cache, "
        f"{found.steps} steps"
    )
    if found.steps == 0:
        raise UserError(f"{found.images} images are less than one batch: lower train.batch_size")
    console.print("[bold]cache[/]   the teacher's embeddings")
    cached = cache(config)
    console.print(f"        {cached.records} records, {human_bytes(cached.bytes)}, {len(cached.skipped)} skipped")
    checked = check(config)
    terms = ", ".join(f"{term.name} {term.grad_norm:.3g}" for term in checked.terms)
    console.print(f"[bold]check[/]   gradient norm at the student: {terms}")
    if not checked.ok:
        raise UserError("; ".join(checked.problems))
    console.print("[bold]train[/]   the student on the cache")
    trained = train(config)
    merged = _merge(config, out)
    with reporting("evaluate", out):
        evaluated = _evaluate(config, merged)
    if evaluated is not None:
        write_json(out / "evaluation.json", evaluated.to_dict(), indent=1)
        console.print(evaluated.table())
    report = tell(config, found, checked, cached, trained, merged, evaluated)
    return RoadResult(config, checked, cached, trained, merged, evaluated, report)


def _merge(config: RunConfig, out: Path) -> MergeReport | None:
    if config.teacher.kind != "sam3":
        console.print(f"[bold]merge[/]   left out: a {config.teacher.kind} teacher has no place for a SAM 3 trunk")
        return None
    suffix = Path(config.teacher.path).suffix
    target = out / (f"merged{suffix}" if suffix in (".pt", ".pth") else "merged")
    found = merge(out, config.teacher.path, target)
    totals = found.totals
    console.print(
        "[bold]merge[/]   "
        + ", ".join(f"{name} {t['tensors']} tensors ({t['elements'] / 1e6:.2f}M)" for name, t in totals.items())
    )
    return found


def _evaluate(config: RunConfig, merged: MergeReport | None) -> EvaluationResult | None:
    """Teacher, untrained and distilled student on the held-out images; None where no host model can be built."""
    if merged is None or merged.layout != "transformers":
        console.print("[bold]evaluate[/] left out: only a transformers folder can be run")
        return None
    console.print("[bold]evaluate[/] on held-out images")
    parts = Assembly(config)
    models = {
        TEACHER: load_model(config.teacher.path, parts.teacher_info.image_size),
        UNTRAINED: _untrained(parts),
        STUDENT: load_model(merged.out),
    }
    source = parts.held_out_source()
    settings = config.evaluate
    total = len(source.keys) if settings.images is None else min(settings.images, len(source.keys))
    with Progress("evaluating", total, "images") as bar:
        return evaluate_models(
            models, source, parts.geometry, teacher=TEACHER, prompts=settings.prompts, images=settings.images,
            batch_size=settings.batch_size, device=default_device(), progress=bar.advance,
        )  # fmt: skip


def _untrained(parts: Assembly) -> Sam3TrackerModel:
    """The teacher's heads on the student as the training found it: same seed, no step."""
    host = load_model(parts.config.teacher.path, parts.teacher_info.image_size)
    torch.manual_seed(parts.config.train.seed)
    trunk = build_trunk(student_config(parts.config.student, parts.teacher_info), parts.config.student.pretrained)
    host.vision_encoder.backbone = trunk.eval()
    host.config.vision_config.backbone_config = trunk.config
    return host
