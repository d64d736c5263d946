"""How much of its teacher's cgF1 does a hosted student keep, in two fresh worlds, and what do further stages add?

    python benchmarks/hosted.py --out benchmarks/results/hosted.txt

The recipe detection/hosted_sandbox on its own scenes, with every seed. Measured are the teacher, the bundled described
student, and the hosted student, also with calibrated scores, on questions about scenes of two worlds that no training
and no calibration has seen. The first seed is trained further, in a phase of all terms, and its scores are also
calibrated in other ways. Errors of the trunk on training scenes and on held-out scenes show whether data limit it.
Finished stages are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Sheet, arguments, setting, spread, train_once, use_device
from torch import Tensor
from torch.nn import functional as F

import samdistill
from samdistill.data.saco import ConceptSet, find_concepts
from samdistill.engine import Checkpoint, read_lines
from samdistill.evaluation.concepts import evaluate_concepts
from samdistill.inference.concepts import ConceptModel, load_concept_model
from samdistill.io import write_json
from samdistill.jobs.detection.calibration import calibrate
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.loading import load_config
from samdistill.students.scores import ScoreFactors
from samdistill.types import ConceptPrompts, DetectorOutput, ImageBatch

RECIPE, GOAL = "detection/hosted_sandbox", 0.95
WORLDS = (300, 400)
"""Seeds of worlds beside those of the package: 1 and 2 (bundled models), 10 and 11 (default)."""
TEACHER, DESCRIBED = "teacher", "described student, bundled"
HOSTED, CALIBRATED, FURTHER = "hosted", "hosted, calibrated", "hosted, then a phase of all terms"
SOFT, BIASED = "calibrated to probabilities, with bias", "calibrated to decisions, with bias"
SHARED = "teacher, the calibrated student's factors"
MEASURES = {"cgF1": "cgf1", "pmF1": "pmf1", "IL_MCC": "il_mcc", "mask AP": "mask_ap"}
ALL_TERMS = {"name": "outputs", "epochs": 2, "lr": 5e-4, "warmup_steps": 25}
"""The phase after those of the recipe."""
IMAGES = 128
"""Held-out scenes that calibrate."""


def train(args: argparse.Namespace, seed: int) -> tuple[DetectionRunConfig, Path]:
    """Run the recipe with a seed, and return its configuration and the last checkpoint of the recipe's phases."""
    run, phases = args.work / f"seed{seed}", recipe_phases()
    further = [ALL_TERMS] if seed == args.first_seed else []
    settings = [
        setting("output", run), setting("data.root", args.work / "scenes"), "data.workers=0", f"train.seed={seed}",
        f"data.seed={seed}", f"train.phases={json.dumps([*phases, *further])}", *args.overrides,
    ]  # fmt: skip
    train_once(RECIPE, settings, args.work / f"{run.name}.txt", 1, "student/tokenizer.json")
    config = load_config(RECIPE, settings)
    assert isinstance(config, DetectionRunConfig)
    return config, run / f"ckpt_epoch_{sum(phase['epochs'] for phase in phases)}.pt"


def recipe_phases() -> list[dict[str, Any]]:
    """Return the phases of the recipe."""
    config = load_config(RECIPE)
    assert isinstance(config, DetectionRunConfig) and config.train.phases is not None
    return [phase.model_dump(mode="json") for phase in config.train.phases]


def detector_of(config: DetectionRunConfig, checkpoint: Path) -> ConceptModel:
    """Return the student of a checkpoint."""
    parts = DetectionParts(config)
    student = parts.task().build_student()
    student.load_state_dict(Checkpoint.load(checkpoint).model)
    return parts.kind.detector(student.eval(), parts.words)


class Scaled:
    """A detector with logits changed by factors and biases, as ``ScoreFactors`` but outside the model."""

    def __init__(self, detector: ConceptModel, query: Sequence[float], presence: Sequence[float]) -> None:
        self.detector, self.query, self.presence = detector, query, presence
        self.image_size, self.words, self.model = detector.image_size, detector.words, detector.model

    def answer(self, images: ImageBatch, prompts: ConceptPrompts) -> DetectorOutput:
        found = self.detector.answer(images, prompts)
        query, presence = (
            factor * logits + bias
            for logits, (factor, bias) in ((found.pred_logits, self.query), (found.presence_logits, self.presence))
        )
        return replace(found, pred_logits=query, presence_logits=presence)


def fitted(logits: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Return factor and bias with the lowest cross-entropy."""
    line = torch.tensor([1.0, 0.0], requires_grad=True)
    optimiser = torch.optim.LBFGS([line], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(line[0] * logits + line[1], wanted)
        loss.backward()
        return loss

    optimiser.step(closure)
    factor, bias = line.tolist()
    return factor, bias


def calibrations(
    config: DetectionRunConfig, checkpoint: Path, extra: bool
) -> tuple[dict[str, ConceptModel], ScoreFactors]:
    """Return the student with calibrated scores and, with ``extra``, other ways and the teacher with its factors."""
    teacher, asked = DetectionParts(config).teacher, list(DetectionParts(config).task().held_out_questions(IMAGES))
    student, plain = detector_of(config, checkpoint), detector_of(config, checkpoint)
    found: dict[str, ConceptModel] = {CALIBRATED: student}
    factors = calibrate(student, teacher, asked, config.match)
    if extra:
        answers = [(plain.answer(*each), teacher.answer(*each)) for each in asked]
        for name, wanted in ((SOFT, torch.sigmoid), (BIASED, lambda logits: (logits > 0).float())):
            lines = [
                fitted(
                    torch.cat([getattr(ours, key).flatten() for ours, _ in answers]),
                    wanted(torch.cat([getattr(theirs, key).flatten() for _, theirs in answers])),
                )
                for key in ("pred_logits", "presence_logits")
            ]
            found[name] = Scaled(plain, *lines)
        found[SHARED] = Scaled(load_concept_model("sandbox"), (factors.query, 0.0), (factors.presence, 0.0))
    return found, factors


def measure(models: dict[str, ConceptModel], args: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Return the rows of the models beside the teacher, by world."""
    everyone = {TEACHER: load_concept_model("sandbox"), **models}
    found = {}
    for world in WORLDS:
        listing = find_concepts(args.work / f"world{world}")
        assert listing is not None
        result = evaluate_concepts(
            everyone, ConceptSet.load(listing), teacher=TEACHER, batch_size=8, pictures=0, repeats=repeats
        )
        found[str(world)] = result.to_dict()
    return found


def measured(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train and measure one seed, and return the rows by world, the factors, errors and seconds."""
    (config, end), first = train(args, seed), seed == args.first_seed

    def rows() -> dict[str, Any]:
        ways, factors = calibrations(config, end, first)
        models = {HOSTED: detector_of(config, end), **ways}
        if first:
            models = {DESCRIBED: load_concept_model("sandbox-student"), **models}
            models[FURTHER] = load_concept_model(config.output)
        found = measure(models, args, args.repeats if first else 0)
        return {"worlds": found, "factors": factors.to_dict(), **training(config, end)}

    path = args.work / f"measured-seed{seed}.json"
    if not path.is_file():
        write_json(path, rows())
    return json.loads(path.read_text())


def training(config: DetectionRunConfig, end: Path) -> dict[str, Any]:
    """Return minutes of the recipe's phases, and the error of the trunk on training and held-out scenes by epoch."""
    epochs = int(end.stem.rpartition("_")[2])
    lines = [line for line in read_lines(config.output / "metrics.jsonl") if line.get("epoch", 0) <= epochs]
    steps = [line for line in lines if "terms" in line]
    by_epoch = [[line["terms"]["trunk"] for line in steps if line["epoch"] == epoch + 1] for epoch in range(epochs)]
    errors = {
        "training, mean of the epoch": [statistics.fmean(values) for values in by_epoch],
        "held out, after it": [line["validate"]["trunk"] for line in lines if "validate" in line],
    }
    return {"errors": errors, "minutes": max(line["seconds"] for line in steps) / 60, "steps": steps[-1]["step"]}


def row_of(found: dict[str, Any], world: str, name: str) -> dict[str, Any]:
    return next(one for one in found[world]["models"] if one["name"] == name)


def say(sheet: Sheet, seeds: Sequence[dict[str, Any]]) -> None:
    """Print the tables."""
    for world in map(str, WORLDS):
        facts, rows = seeds[0]["worlds"][world], []
        for name in (one["name"] for one in facts["models"]):
            found = [row for one in seeds for row in one["worlds"][world]["models"] if row["name"] == name]
            rows.append(line(name, found[:1] if name == TEACHER else found))
        sheet.table(
            f"world {world}: {facts['questions']} questions about {facts['images']} scenes; {len(seeds)} seed(s)",
            ["", *MEASURES, "cgF1 kept", "parameters", "ms"], rows,
        )  # fmt: skip
    errors = seeds[0]["errors"]
    rows = [[name, *(f"{values[at]:.3f}" for at in (0, 3, 7, -1))] for name, values in errors.items()]
    sheet.table("squared error of the trunk, first seed, by epoch of its phase", ["", "1", "4", "8", "last"], rows)
    sheet.say()
    for number, one in enumerate(seeds):
        factors = ", ".join(f"{name} {value:.2f}" for name, value in one["factors"].items())
        sheet.say(
            f"seed {number}: {one['steps']} steps, {one['minutes']:.0f} minutes of a core that others used too; "
            f"factors of the logits: {factors}"
        )


def line(name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line of a table: a model, in one or several seeds."""
    cells = [spread([one[key] for one in rows], ".3f") for key in MEASURES.values()]
    share = "" if name == TEACHER else spread([one["kept"] for one in rows], ".1%")
    took = rows[0]["latency_ms"]
    return [name, *cells, share, f"{rows[0]['parameters'] / 1e6:.2f}M", "" if took is None else f"{took:.0f}"]


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "hosted")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    parser.add_argument("--scenes", type=int, default=128, help="scenes of each fresh world (128)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=9, help="rounds of the latency (9)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    sheet = Sheet(use_device(args.device))
    args.work = args.work.resolve()
    samdistill.render_sandbox(args.work / "scenes", format="coco", progress=False)
    for world in WORLDS:
        folder = args.work / f"world{world}"
        samdistill.render_sandbox(folder, train=1, val=args.scenes, seed=world, format="coco", progress=False)
    torch.set_num_threads(1)
    seeds = [measured(args, seed) for seed in range(args.first_seed, args.first_seed + args.seeds)]
    say(sheet, seeds)
    sheet.say()
    for name in (HOSTED, CALIBRATED):
        least = min(row_of(one["worlds"], str(world), name)["kept"] for one in seeds for world in WORLDS)
        verdict = "met" if least >= GOAL else "MISSED"
        sheet.say(
            f"{name}: goal of {GOAL:.0%} of the teacher's cgF1 in every world and seed {verdict}, least {least:.1%}"
        )
    sheet.say(
        "Not measured: exemplar boxes, photographs, the published SAM 3, a small text encoder beside the trunk, pairs "
        "by cost, a neck that trains."
    )
    sheet.save(args.out, {"seeds": seeds})


if __name__ == "__main__":
    main()
