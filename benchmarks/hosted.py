"""How much of its teacher's cgF1 does a hosted student keep, after each stage of its recipe, in two fresh worlds?

    python benchmarks/hosted.py --out benchmarks/results/hosted.txt

The recipe detection/hosted_sandbox on its own scenes, with every seed. Measured are the teacher, the bundled described
student, and the hosted student after the phase of the trunk, after the phase of outputs, and with calibrated scores, on
questions about scenes of two worlds that no training and no calibration has seen. With --variants, the phase of outputs
is also run with pairs by cost, and with a neck that trains, both from the trunk of the first seed. Squared errors of
the trunk on training scenes and on held-out scenes show whether data limit it. Finished stages are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
from samdistill.jobs.detection.config import HOST_PARTS, DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.loading import load_config
from samdistill.students.scores import ScoreFactors
from samdistill.types import ConceptPrompts, DetectorOutput, ImageBatch

RECIPE, GOAL = "detection/hosted_sandbox", 0.95
WORLDS = (300, 400)
"""Seeds of worlds beside those of the package: 1 and 2 (bundled models), 10 and 11 (default)."""
TEACHER, DESCRIBED = "teacher", "described student, bundled"
TRUNK, OUTPUTS, CALIBRATED = "hosted, trunk phase", "hosted, outputs phase", "hosted, calibrated"
SOFT, BIASED, SHARED = "probabilities, factor and bias", "decisions, factor and bias", "teacher, the student's factors"
MEASURES = {"cgF1": "cgf1", "pmF1": "pmf1", "IL_MCC": "il_mcc", "mask AP": "mask_ap"}
NECK = [glob for glob in HOST_PARTS if not glob.startswith("vision_encoder.neck")]
VARIANTS = {
    "pairs by cost": ["match.method=hungarian"],
    "neck trains": [f"train.freeze={json.dumps([{'match': NECK}])}"],
}
"""Settings of the phase of outputs."""


def train(args: argparse.Namespace, seed: int) -> DetectionRunConfig:
    """Run the recipe with a seed, and return its configuration."""
    run = args.work / f"seed{seed}"
    settings = [
        setting("output", run), setting("data.root", args.work / "scenes"), "data.workers=0", "calibration.images=0",
        f"train.seed={seed}", f"data.seed={seed}", *args.overrides,
    ]  # fmt: skip
    train_once(RECIPE, settings, args.work / f"{run.name}.txt", 1, "student/tokenizer.json")
    config = load_config(RECIPE, settings)
    assert isinstance(config, DetectionRunConfig)
    return config


def trunk_checkpoint(config: DetectionRunConfig) -> Path:
    """Return the checkpoint at the end of the first phase."""
    assert config.train.phases is not None
    return config.output / f"ckpt_epoch_{config.train.phases[0].epochs}.pt"


def detector_of(config: DetectionRunConfig, checkpoint: Path | None = None) -> ConceptModel:
    """Return the finished student of a run, or the one of a checkpoint."""
    if checkpoint is None:
        return load_concept_model(config.output)
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


def held_out(config: DetectionRunConfig) -> list[tuple[ImageBatch, ConceptPrompts]]:
    """Return the questions that calibrate the recipe's student."""
    recipe = load_config(RECIPE)
    assert isinstance(recipe, DetectionRunConfig)
    return list(DetectionParts(config).task().held_out_questions(recipe.calibration.images))


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
    return float(line[0]), float(line[1])


def calibrations(config: DetectionRunConfig, extra: bool) -> tuple[dict[str, ConceptModel], ScoreFactors]:
    """Return the finished student with calibrated scores and, with ``extra``, other ways and the teacher."""
    student, teacher, asked = detector_of(config), DetectionParts(config).teacher, held_out(config)
    answers = [(student.answer(*each), teacher.answer(*each)) for each in asked] if extra else []
    found: dict[str, ConceptModel] = {}
    factors = calibrate(student, teacher, asked, config.match)
    found[CALIBRATED] = student
    if extra:
        plain = detector_of(config)
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


def vary(args: argparse.Namespace, first: DetectionRunConfig, name: str) -> ConceptModel:
    """Run the phase of outputs with other settings, from the trunk of the first seed."""
    start, run = args.work / "trunk" / "student", args.work / name.replace(" ", "_")
    if not start.is_dir():
        found = detector_of(first, trunk_checkpoint(first))
        found.model.save_pretrained(start.with_suffix(".partial"))
        start.with_suffix(".partial").rename(start)
    assert first.train.phases is not None
    last = [first.train.phases[-1].model_dump(mode="json")]
    settings = [
        setting("output", run), setting("data.root", args.work / "scenes"), "data.workers=0",
        "calibration.images=0", setting("student.start", start), f"train.phases={json.dumps(last)}",
        *VARIANTS[name], *args.overrides,
    ]  # fmt: skip
    train_once(RECIPE, settings, args.work / f"{run.name}.txt", 1, "student/tokenizer.json")
    config = load_config(RECIPE, settings)
    assert isinstance(config, DetectionRunConfig)
    return detector_of(config)


def varied(args: argparse.Namespace, first: DetectionRunConfig, name: str) -> dict[str, Any]:
    return measure(args, {name: vary(args, first, name)}, 0)


def kept(args: argparse.Namespace, name: str, work: Callable[[], Any]) -> Any:
    """Return the result of ``work``, which is kept in a file and not computed again."""
    path = args.work / f"{name}.json"
    if not path.is_file():
        write_json(path, work())
    return json.loads(path.read_text())


def measure(args: argparse.Namespace, models: dict[str, ConceptModel], repeats: int) -> dict[str, Any]:
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
    config, first = train(args, seed), seed == args.first_seed

    def rows() -> dict[str, Any]:
        ways, factors = calibrations(config, first)
        models = {TRUNK: detector_of(config, trunk_checkpoint(config)), OUTPUTS: detector_of(config), **ways}
        beside = {DESCRIBED: load_concept_model("sandbox-student")} if first else {}
        found = measure(args, {**beside, **models}, args.repeats if first else 0)
        return {"worlds": found, "factors": factors.to_dict(), **training(config)}

    return kept(args, f"measured-seed{seed}", rows)


def training(config: DetectionRunConfig) -> dict[str, Any]:
    """Return seconds and steps of the phases, and the error of the trunk on training and held-out scenes by epoch."""
    lines = read_lines(config.output / "metrics.jsonl")
    assert config.train.phases is not None
    first = config.train.phases[0].epochs
    steps = [line for line in lines if "terms" in line and "seconds" in line]
    parts = [[line for line in steps if (line["epoch"] <= first) == inside] for inside in (True, False)]
    ends = [max(line["seconds"] for line in part) for part in parts]
    errors = {
        "training": [
            sum(values) / len(values)
            for epoch in range(1, first + 1)
            if (values := [line["terms"]["trunk"] for line in parts[0] if line["epoch"] == epoch])
        ],
        "held out": [line["validate"]["trunk"] for line in lines if "validate" in line and line["epoch"] <= first],
    }
    seconds = {"trunk phase": ends[0], "outputs phase": ends[1] - ends[0]}
    return {"errors": errors, "seconds": seconds, "steps": [max(line["step"] for line in part) for part in parts]}


def row_of(found: dict[str, Any], world: str, name: str) -> dict[str, Any]:
    return next(one for one in found[world]["models"] if one["name"] == name)


def say(sheet: Sheet, seeds: Sequence[dict[str, Any]], variants: dict[str, dict[str, Any]]) -> None:
    """Print the tables."""
    for world in map(str, WORLDS):
        facts, rows = seeds[0]["worlds"][world], []
        for name in (one["name"] for one in facts["models"]):
            found = [row for one in seeds for row in one["worlds"][world]["models"] if row["name"] == name]
            rows.append(line(name, found[:1] if name == TEACHER else found))
        rows += [line(f"{name}, first seed", [row_of(one, world, name)]) for name, one in variants.items()]
        sheet.table(
            f"world {world}: {facts['questions']} questions about {facts['images']} scenes; {len(seeds)} seed(s)",
            ["", *MEASURES, "cgF1 kept", "parameters", "ms"], rows,
        )  # fmt: skip
    errors = seeds[0]["errors"]
    rows = [[name, *(f"{values[at]:.3f}" for at in (0, 3, 7, -1))] for name, values in errors.items()]
    sheet.table("squared error of the trunk, first seed, by epoch of its phase", ["", "1", "4", "8", "last"], rows)
    sheet.say()
    for number, one in enumerate(seeds):
        took = ", ".join(f"{name} {seconds / 60:.0f} min" for name, seconds in one["seconds"].items())
        factors = ", ".join(f"{name} {value:.2f}" for name, value in one["factors"].items())
        sheet.say(f"seed {number}: {took}, on one core that was shared; factors of the logits: {factors}")


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
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=[], help="of the phase of outputs")
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
    first = train(args, args.first_seed)
    variants = {name: kept(args, f"measured-{name}", partial(varied, args, first, name)) for name in args.variants}
    say(sheet, seeds, variants)
    sheet.say()
    for name in (OUTPUTS, CALIBRATED):
        least = min(row_of(one, str(world), name)["kept"] for one in (s["worlds"] for s in seeds) for world in WORLDS)
        verdict = "met" if least >= GOAL else "MISSED"
        sheet.say(
            f"{name}: goal of {GOAL:.0%} of the teacher's cgF1 in every world and seed {verdict}, least {least:.1%}"
        )
    sheet.say("Not measured: exemplar boxes, photographs, the published SAM 3, a small text encoder beside the trunk.")
    sheet.save(args.out, {"seeds": seeds, "variants": variants})


if __name__ == "__main__":
    main()
