"""``samdistill demo --job prompt``: plan, check, train, evaluate, report; resumable as a whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ..checkpoints.promptable import load_promptable
from ..config import PromptRunConfig, load_config
from ..data.skipped import reporting
from ..engine import CheckReport, FitResult, default_device
from ..evaluation import EvaluationResult, evaluate_models
from ..inference.prompting import KINDS
from ..io import as_path, write_json
from ..locks import locked
from ..ops.promptable import Promptable, image_size
from ..report import human_bytes
from ..sandbox.scenes import SceneStyle
from ..sandbox.write import write_coco
from ..tasks.prompt import PromptTask
from ..types import UserError
from .cache import cache
from .progress import Progress
from .prompt import PromptAssembly, plan_prompt
from .story import STUDENT, TEACHER, UNTUNED, tell_prompt
from .train import check, train

console = Console(soft_wrap=True, highlight=False)
WORLD = SceneStyle(max_objects=8, min_objects=3, min_radius=0.06, max_radius=0.16)
"""More and smaller objects than the sandbox's models have seen, as a person's photographs are other than SAM's."""
SCENES, SIZE, SEED = {"train": 384, "val": 64}, 168, 30


@dataclass(frozen=True)
class PromptRoad:
    """What a whole prompt run left behind."""

    config: PromptRunConfig
    checked: CheckReport
    trained: FitResult
    evaluated: EvaluationResult
    report: Path

    def summary(self) -> str:
        """The few lines a person wants to read at the end."""
        tuned, start = self.evaluated.row(STUDENT), self.evaluated.row(UNTUNED)
        teacher = next((row for row in self.evaluated.rows if row.name == TEACHER), None)
        lines = []
        for kind, value in tuned.miou.items():
            theirs = f", its teacher {teacher.miou[kind]:.3f}" if teacher is not None else ""
            lines.append(f"{kind}: mIoU {value:.3f} (untuned {start.miou[kind]:.3f}{theirs})")
        return "\n".join([*lines, f"student: {self.trained.student}", f"report: {self.report}"])


def demo_prompt(out: str | Path, *, overrides: Sequence[str] = ()) -> PromptRoad:
    """The prompt job on the sandbox: rendered scenes with masks, the bundled SAM and MobileSAM; minutes."""
    out = as_path(out)
    data = out / "data"
    with locked(out, "demo"):
        console.print("[bold]render[/]  scenes with their masks, COCO layout")
        for seed, (split, count) in enumerate(SCENES.items(), SEED):
            with Progress(f"rendering {split}", count, "scenes") as bar:
                write_coco(data, count, SIZE, seed, split, WORLD, progress=lambda done, _, bar=bar: bar.at(done))
        settings = [f"output={json.dumps(str(out / 'run'))}", f"data.root={json.dumps(str(data))}"]
        config = load_config("prompt/sandbox", [*settings, *overrides])
        assert isinstance(config, PromptRunConfig)
        return walk_prompt(config)


def walk_prompt(config: PromptRunConfig) -> PromptRoad:
    """All stages of one config. Each looks at what is there and does only what is missing."""
    out, found = config.output, plan_prompt(config)
    teachers = ", ".join(f"{teacher.name} {teacher.params / 1e6:.2f}M" for teacher in found.teachers) or "nobody"
    console.print(
        f"[bold]plan[/]    {found.student}: {found.student_params / 1e6:.2f}M parameters, taught by {teachers}; "
        f"{found.images} images with {found.objects} objects each, {found.steps} steps"
    )
    if found.steps == 0:
        raise UserError(f"{found.images} images are less than one batch: lower train.batch_size")
    if config.cached:
        cached = cache(config)
        console.print(f"[bold]cache[/]   {cached.records} views, {human_bytes(cached.bytes)}")
    checked = check(config)
    for stage in dict.fromkeys(term.phase for term in checked.terms):
        terms = ", ".join(f"{term.name} {term.grad_norm:.3g}" for term in checked.terms if term.phase == stage)
        console.print(f"[bold]check[/]   gradient norm at the student, {stage or 'all terms'}: {terms}")
    if not checked.ok:
        raise UserError("; ".join(checked.problems))
    console.print("[bold]train[/]   the student on masks and on what its teachers say")
    trained = train(config)
    console.print("[bold]evaluate[/] on held-out images")
    with reporting("evaluate", out):
        evaluated = evaluate_road(config)
    write_json(out / "evaluation.json", evaluated.to_dict(), indent=1)
    console.print(evaluated.table())
    report = tell_prompt(config, checked, trained, evaluated)
    return PromptRoad(config, checked, trained, evaluated, report)


def evaluate_road(config: PromptRunConfig) -> EvaluationResult:
    """The weightiest teacher, the student before and after, on the held-out images of a finished run.

    A teacher that reads images of another size cannot be shown the same canvas and is left out.
    """
    parts, settings = PromptAssembly(config), config.evaluate
    torch.manual_seed(config.train.seed)  # as the training found it: same seed, no step
    task = PromptTask(config, None, parts.objects)
    models: dict[str, Promptable] = {
        UNTUNED: task.export(task.build_student()), STUDENT: load_promptable(config.output),
    }  # fmt: skip
    if config.distilled:
        entry = max(config.teachers, key=lambda teacher: teacher.weight)
        teacher = load_promptable(entry.checkpoint, entry.image_size)
        if image_size(teacher) == parts.image_size:
            models = {TEACHER: teacher, **models}
        else:
            console.print(f"         without the teacher {entry.name}: it reads images of {image_size(teacher)} px")
    source = parts.held_out_source()
    total = len(source.keys) if settings.images is None else min(settings.images, len(source.keys))
    kinds = tuple(kind for kind in KINDS if kind in settings.prompts)
    with Progress("evaluating", total, "images") as bar:
        return evaluate_models(
            models, source, parts.geometry, teacher=TEACHER if TEACHER in models else None, prompts=kinds,
            images=settings.images, batch_size=settings.batch_size, device=default_device(), progress=bar.advance,
        )  # fmt: skip
