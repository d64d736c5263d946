"""``samdistill demo --job detection``: plan, check, train, evaluate, report; resumable as a whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ..config import DetectionRunConfig, load_config
from ..data.saco import ConceptSet, find_concepts
from ..data.skipped import reporting
from ..engine import CheckReport, FitResult, default_device
from ..evaluation.concepts import ConceptResult, evaluate_concepts, some_images
from ..inference.concepts import StudentDetector, load_concept_model
from ..io import as_path, write_json
from ..locks import locked
from ..types import UserError
from .detection import DetectionAssembly, plan_detection
from .progress import Progress
from .sandbox import render_sandbox
from .story import STUDENT, TEACHER, UNTRAINED, tell_detection
from .train import check, train

console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class DetectionRoad:
    """What a whole detection run left behind."""

    config: DetectionRunConfig
    checked: CheckReport
    trained: FitResult
    evaluated: ConceptResult
    report: Path

    def summary(self) -> str:
        """The few lines a person wants to read at the end."""
        student, start = self.evaluated.row(STUDENT), self.evaluated.row(UNTRAINED)
        teacher = self.evaluated.row(TEACHER)
        kept = f"{student.kept:.1%} of " if student.kept is not None else ""
        return (
            f"cgF1: the student's {student.cgf1:.3f} is {kept}the teacher's {teacher.cgf1:.3f} "
            f"(untrained {start.cgf1:.3f})\n"
            f"student: {self.trained.student}\nreport: {self.report}"
        )


def demo_detection(out: str | Path, *, overrides: Sequence[str] = ()) -> DetectionRoad:
    """The detection job on the sandbox: rendered scenes with words, the bundled detector, minutes on two cores."""
    out = as_path(out)
    data = out / "data"
    with locked(out, "demo"):
        console.print("[bold]render[/]  scenes with their words, COCO and SA-Co layouts")
        render_sandbox(data, format="coco")
        settings = [f"output={json.dumps(str(out / 'run'))}", f"data.root={json.dumps(str(data))}"]
        config = load_config("detection/sandbox", [*settings, *overrides])
        assert isinstance(config, DetectionRunConfig)
        return walk_detection(config)


def walk_detection(config: DetectionRunConfig) -> DetectionRoad:
    """All stages of one config. Each looks at what is there and does only what is missing."""
    out = config.output
    found = plan_detection(config)
    console.print(
        f"[bold]plan[/]    {found.student}: {found.student_params / 1e6:.2f}M parameters and {found.queries} queries "
        f"for {found.teacher_params / 1e6:.2f}M and {found.teacher_queries}; {found.images} images, {found.steps} steps"
    )
    if found.steps == 0:
        raise UserError(f"{found.images} images are less than one batch: lower train.batch_size")
    checked = check(config)
    for phase in dict.fromkeys(term.phase for term in checked.terms):
        terms = ", ".join(f"{term.name} {term.grad_norm:.3g}" for term in checked.terms if term.phase == phase)
        console.print(f"[bold]check[/]   gradient norm at the student, {phase or 'all terms'}: {terms}")
    if not checked.ok:
        raise UserError("; ".join(checked.problems))
    console.print("[bold]train[/]   the student on what the teacher answers")
    trained = train(config)
    console.print("[bold]evaluate[/] on held-out questions")
    with reporting("evaluate", out):
        evaluated = evaluate_road(config)
    write_json(out / "evaluation.json", evaluated.to_dict(), indent=1)
    console.print(evaluated.table())
    report = tell_detection(config, checked, trained, evaluated)
    return DetectionRoad(config, checked, trained, evaluated, report)


def evaluate_road(config: DetectionRunConfig) -> ConceptResult:
    """Teacher, untrained and distilled student on the held-out questions of a finished run."""
    settings = config.evaluate
    listing = settings.concepts or find_concepts(config.data.root)
    if listing is None:
        raise UserError(
            f"{config.data.root}: no held-out questions (concepts_val.json); give evaluate.concepts a SA-Co file"
        )
    concepts = some_images(ConceptSet.load(listing), settings.images)
    parts, device = DetectionAssembly(config), default_device()
    torch.manual_seed(config.train.seed)
    untrained = parts.task().build_student().to(device).eval()  # as the training found it: same seed, no step
    models = {
        TEACHER: load_concept_model(config.teacher.path, config.teacher.image_size, device),
        UNTRAINED: StudentDetector(untrained, parts.words),
        STUDENT: load_concept_model(config.output, device=device),
    }
    with Progress("evaluating", len(concepts.pairs), "questions") as bar:
        return evaluate_concepts(
            models, concepts, teacher=TEACHER, geometry=config.data.geometry, threshold=settings.threshold,
            batch_size=settings.batch_size, progress=bar.advance,
        )  # fmt: skip
