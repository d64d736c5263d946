"""A detection student trained for longer than in the demo, with more scenes and steps of the same recipe.

    python benchmarks/detection_student.py --out benchmarks/results/detection_student.txt

The sandbox recipe with --scenes rendered scenes: one run of the phase align, followed by one run of the phases features
and outputs that starts from it (so that further runs can start from the same aligned student). The student is evaluated
as in the demo, on all held-out questions, beside the teacher and an untrained student. Finished stages are not
repeated, and an interrupted training is resumed. About 90 minutes on one core. With --student, nothing is trained:

    python benchmarks/detection_student.py --student sandbox-student --out benchmarks/results/sandbox_student.txt
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import Sheet, arguments, run_cli, setting, use_device

import samdistill
from samdistill.data.saco import ConceptSet, find_concepts
from samdistill.dist import default_device
from samdistill.engine import read_lines
from samdistill.evaluation.concepts import evaluate_concepts
from samdistill.inference.concepts import load_concept_model
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.loading import load_config

RECIPE, GOAL = "detection/sandbox", 0.90
TEACHER, UNTRAINED, DISTILLED = "teacher", "untrained", "distilled"
MEASURES = {"cgF1": "cgf1", "pmF1": "pmf1", "IL_MCC": "il_mcc", "F1@0.5": "f1_50", "F1@0.75": "f1_75",
            "mask AP": "mask_ap"}  # fmt: skip


def phases(epochs: list[int]) -> dict[str, list[dict[str, Any]]]:
    """The recipe's phases with other numbers of epochs, by run."""
    found = [phase.model_dump() for phase in load_config(RECIPE).train.phases or ()]
    align, *others = ({**phase, "epochs": count} for phase, count in zip(found, epochs, strict=True))
    return {"align": [align], "distilled": others}


def train(args: argparse.Namespace, name: str, schedule: list[dict[str, Any]], settings: list[str]) -> Path:
    """A finished run of the recipe in ``--work``."""
    run = args.work / f"{name}-seed{args.seed}"
    if not (run / "student" / "tokenizer.json").is_file():  # written last
        words = [
            *settings, *args.overrides, setting("output", run), setting("data.root", args.work / "scenes"),
            f"train.phases={json.dumps(schedule)}", f"train.seed={args.seed}", f"data.seed={args.seed}",
        ]  # fmt: skip
        run_cli(["train", RECIPE, *words], args.work / f"{run.name}.txt", 1)
    return run


def evaluate(args: argparse.Namespace, student: Path | str) -> dict[str, Any]:
    """Teacher, untrained and distilled student on every held-out question; kept beside the runs."""
    kept = args.work / f"evaluated-{args.student or 'distilled'}-seed{args.seed}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    data = args.work / "scenes"
    config, listing = load_config(RECIPE, [setting("data.root", data), *args.overrides]), find_concepts(data)
    assert isinstance(config, DetectionRunConfig) and listing is not None
    parts, device = DetectionParts(config), default_device()
    torch.manual_seed(args.seed)
    models = {
        TEACHER: load_concept_model(config.teacher.path, device=device),
        UNTRAINED: parts.kind.detector(parts.task().build_student().to(device).eval(), parts.words),
        DISTILLED: load_concept_model(student, device=device),
    }
    found = evaluate_concepts(
        models, ConceptSet.load(listing), teacher=TEACHER, geometry=config.data.geometry,
        threshold=config.evaluate.threshold, batch_size=config.evaluate.batch_size, pictures=0, repeats=0,
    )  # fmt: skip
    kept.write_text(json.dumps(found.to_dict()))
    return found.to_dict()


def training(args: argparse.Namespace, runs: list[Path]) -> str:
    """How long the runs took."""
    last = [[line for line in read_lines(run / "metrics.jsonl") if "seconds" in line][-1] for run in runs]
    steps, minutes = (
        ", ".join(f"{line[key] / unit:.0f}" for line in last) for key, unit in (("step", 1), ("seconds", 60))
    )
    return (
        f"{args.scenes} scenes; align and features + outputs: {steps} steps of 16 images, {minutes} minutes in them by "
        f"the wall clock on one core that was shared at times; seed {args.seed}"
    )


def say(sheet: Sheet, conditions: str, found: dict[str, Any]) -> float:
    """The conditions, the three models, the share that is kept."""
    sheet.say()
    sheet.say(conditions)
    rows = [
        [
            m["name"],
            *(f"{m[key]:.3f}" for key in MEASURES.values()),
            f"{m['parameters'] / 1e6:.2f}M",
            f"{m['kept'] or 0:.1%}",
        ]
        for m in found["models"]
    ]
    sheet.table(
        f"{found['questions']} questions about {found['images']} held-out scenes, {found['positives']} of them for "
        f"something that is there; scores from {found['threshold']:g}",
        ["", *MEASURES, "params", "share of the teacher's cgF1"],
        rows,
    )
    return next(m["kept"] for m in found["models"] if m["name"] == DISTILLED)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "detection_student")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    parser.add_argument("--scenes", type=int, default=8000, help="to train on (8000)")
    parser.add_argument("--epochs", default="10,4,1", help="of align, features and outputs (10,4,1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--student", help="evaluate this student and train none: sandbox-student, or a folder")
    return parser.parse_args()


def main() -> None:
    args = parse()
    sheet = Sheet(use_device(args.device))
    args.work = args.work.resolve()
    scenes = 1 if args.student else args.scenes  # only held-out scenes are read then
    samdistill.render_sandbox(args.work / "scenes", train=scenes, format="coco", progress=False)
    if args.student:
        student, conditions = args.student, f"{args.student} as it is"
    else:
        schedules = phases([int(text) for text in args.epochs.split(",")])
        aligned = train(args, "align", schedules["align"], [])
        start = [setting("student.start", aligned), "student.inherit=false"]
        student = train(args, "distilled", schedules["distilled"], start)
        conditions = training(args, [aligned, student])
    found = evaluate(args, student)
    share = say(sheet, conditions, found)
    sheet.say()
    sheet.say(f"goal: at least {GOAL:.0%} of the teacher's cgF1: {'met' if share >= GOAL else 'MISSED'} ({share:.1%})")
    sheet.say("Not measured: further seeds, exemplar boxes, scenes of another size, photographs, the published SAM 3.")
    figures = {"student": args.student, "evaluation": found}
    if not args.student:
        figures |= {"scenes": args.scenes, "epochs": args.epochs, "seed": args.seed}
    sheet.save(args.out, figures)


if __name__ == "__main__":
    main()
