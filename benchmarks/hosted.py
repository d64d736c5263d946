"""How much of its teacher's cgF1 does a hosted student keep, in two fresh worlds, and what do further stages add?

    python benchmarks/hosted.py --out benchmarks/results/hosted.txt

The recipe detection/hosted_sandbox on its own scenes, with every seed. Measured are the teacher, the bundled described
student, the same student's feature maps in the teacher's heads (stitched, without training), and the hosted student,
also with calibrated scores, on questions about scenes of two worlds that no training and no calibration has seen. Then
with a small text encoder in the place of the teacher's: from the recipe text/sandbox, which keeps a fifth of the
phrases out of training; and both encoders trained further by detection/hosted_joint_sandbox. The first seed is also
trained further with the teacher's text encoder, in a phase of all terms, and its scores are calibrated in other ways.
Errors of the trunk on training scenes and on held-out scenes show whether data limit it. Finished stages are not
repeated.
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
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

import samdistill
from samdistill.checkpoints.report import sidecar
from samdistill.data.saco import ConceptSet, find_concepts
from samdistill.engine import Checkpoint, read_lines
from samdistill.evaluation.concepts import evaluate_concepts
from samdistill.inference.concepts import ConceptModel, load_concept_model
from samdistill.io import write_json
from samdistill.jobs.detection.calibration import calibrate
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.loading import load_config
from samdistill.losses.maps import resized
from samdistill.ops.images import normalise
from samdistill.ops.outputs import ask
from samdistill.students.scores import ScoreFactors
from samdistill.teachers import Sam3Detector
from samdistill.types import ConceptPrompts, DetectorOutput, ImageBatch

RECIPE, GOAL = "detection/hosted_sandbox", 0.95
TEXT, JOINT = "text/sandbox", "detection/hosted_joint_sandbox"
WORLDS = (300, 400)
"""Seeds of worlds beside those of the package: 1 and 2 (bundled models), 10 and 11 (default)."""
TEACHER, DESCRIBED = "teacher", "described student, bundled"
STITCHED = "described student's features in the teacher's heads"
HOSTED, CALIBRATED, FURTHER = "hosted", "hosted, calibrated", "hosted, then a phase of all terms"
SMALL, JOINED = "hosted, small text encoder", "the same, then joint fine-tuning"
JOINED_CALIBRATED = "the same, joint and calibrated"
SOFT, BIASED = "calibrated to probabilities, with bias", "calibrated to decisions, with bias"
SHARED = "teacher, the calibrated student's factors"
MEASURES = {"cgF1": "cgf1", "pmF1": "pmf1", "IL_MCC": "il_mcc", "mask AP": "mask_ap"}
ALL_TERMS = {"name": "outputs", "epochs": 2, "lr": 5e-4, "warmup_steps": 25}
"""The phase after those of the recipe."""
IMAGES = 128
"""Held-out scenes that calibrate."""


def render(args: argparse.Namespace) -> None:
    """Render the scenes of the recipe and of the two worlds."""
    samdistill.render_sandbox(args.work / "scenes", format="coco", progress=False)
    for world in WORLDS:
        folder = args.work / f"world{world}"
        samdistill.render_sandbox(folder, train=1, val=args.scenes, seed=world, format="coco", progress=False)


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


def train_text(args: argparse.Namespace, seed: int) -> Path:
    """Train a small text encoder with a seed, which also selects the phrases that it does not learn."""
    run = args.work / f"text-seed{seed}"
    questions = find_concepts(args.work / f"world{WORLDS[0]}")
    assert questions is not None
    settings = [
        setting("output", run), setting("evaluate.concepts", questions), "cache.mode=online", f"data.seed={seed}",
        f"train.seed={seed}",
    ]  # fmt: skip
    train_once(TEXT, settings, args.work / f"{run.name}.txt", 1, "student/tokenizer.json")
    return run


def with_text(args: argparse.Namespace, seed: int, config: DetectionRunConfig, end: Path) -> tuple[Path, Path]:
    """Return the folder of the hosted student of a checkpoint with a small text encoder, and the text run."""
    text, trunk, whole = train_text(args, seed), args.work / f"trunk-seed{seed}", args.work / f"small-seed{seed}"
    if not sidecar(whole).is_file():
        detector = detector_of(config, end)
        detector.model.save_pretrained(trunk)
        detector.words.save(trunk)
        samdistill.merge(text, trunk, whole)
    return whole, text


def train_joint(args: argparse.Namespace, seed: int, start: Path, text: Path) -> DetectionRunConfig:
    """Train both encoders of a student further, and return the configuration of the run."""
    run = args.work / f"joint-seed{seed}"
    settings = [
        setting("output", run), setting("data.root", args.work / "scenes"), setting("student.start", start),
        setting("student.text_encoder", text), "data.workers=0", f"train.seed={seed}", f"data.seed={seed}",
    ]  # fmt: skip
    train_once(JOINT, settings, args.work / f"{run.name}.txt", 1, "student/tokenizer.json")
    config = load_config(JOINT, settings)
    assert isinstance(config, DetectionRunConfig)
    return config


def recipe_phases() -> list[dict[str, Any]]:
    """Return the phases of the recipe."""
    config = load_config(RECIPE)
    assert isinstance(config, DetectionRunConfig) and config.train.phases is not None
    return [phase.model_dump(mode="json") for phase in config.train.phases]


def detector_of(config: DetectionRunConfig, checkpoint: Path) -> ConceptModel:
    """Return the student of a checkpoint."""
    parts = DetectionParts(config)
    student = parts.task().build_student()
    student.load_state_dict({**student.state_dict(), **Checkpoint.load(checkpoint).model})  # without what never trained
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


class Stitched:
    """A teacher that reads the feature maps of a described student in the place of its own."""

    def __init__(self, teacher: Sam3Detector, student: ConceptModel) -> None:
        self.teacher, self.student, self.words, self.image_size = teacher, student, teacher.words, teacher.image_size
        neck, heads = teacher.model.vision_encoder.neck, dict(teacher.model.named_children())
        self.position = neck.position_encoding
        self.model = nn.ModuleDict({"features": student.model.vision_encoder, **heads, "vision_encoder": nn.Identity()})

    @torch.no_grad()
    def answer(self, images: ImageBatch, prompts: ConceptPrompts) -> DetectorOutput:
        vision = self.student.model.config.vision_config
        pixels = normalise(images.images, tuple(vision.image_mean), tuple(vision.image_std))
        found, info = self.student.model(pixel_values=pixels).fpn_hidden_states, self.teacher.info
        levels = [
            resized(level, torch.empty(1, 1, side, side)) for level, side in zip(found[:3], info.levels, strict=True)
        ]
        levels.append(levels[-1])  # the heads drop the last level
        places = tuple(self.position(level.shape, level.device, level.dtype) for level in levels)
        read = Sam3VisionEncoderOutput(fpn_hidden_states=tuple(levels), fpn_position_encoding=places)
        asked = self.words.inputs(prompts, "cpu")
        return ask(
            self.teacher.model, read, prompts.image, self.teacher.text(prompts), asked["attention_mask"],
            asked["input_boxes"], asked["input_boxes_labels"],
        )  # fmt: skip


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


def calibrated(config: DetectionRunConfig) -> ConceptModel:
    """Return the finished student of a run with calibrated scores."""
    parts, student = DetectionParts(config), load_concept_model(config.output)
    calibrate(student, parts.teacher, parts.task().held_out_questions(IMAGES), config.match)
    return student


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
        start, text = with_text(args, seed, config, end)
        joint = train_joint(args, seed, start, text)
        models = {
            HOSTED: detector_of(config, end), **ways, SMALL: load_concept_model(start),
            JOINED: load_concept_model(joint.output), JOINED_CALIBRATED: calibrated(joint),
        }  # fmt: skip
        if first:
            teacher, described = load_concept_model("sandbox"), load_concept_model("sandbox-student")
            assert isinstance(teacher, Sam3Detector)
            models = {DESCRIBED: described, STITCHED: Stitched(teacher, described), **models}
            models[FURTHER] = load_concept_model(config.output)
        found = measure(models, args, args.repeats if first else 0)
        minutes = max(line["seconds"] for line in read_lines(joint.output / "metrics.jsonl") if "seconds" in line) / 60
        return {"worlds": found, "factors": factors.to_dict(), "joint_minutes": minutes, **training(config, end)}

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
            f"factors of the logits: {factors}; joint fine-tuning {one['joint_minutes']:.0f} minutes"
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
    render(args)
    torch.set_num_threads(1)
    seeds = [measured(args, seed) for seed in range(args.first_seed, args.first_seed + args.seeds)]
    say(sheet, seeds)
    sheet.say()
    for name in (HOSTED, CALIBRATED, SMALL, JOINED, JOINED_CALIBRATED):
        least = min(row_of(one["worlds"], str(world), name)["kept"] for one in seeds for world in WORLDS)
        verdict = "met" if least >= GOAL else "MISSED"
        sheet.say(
            f"{name}: goal of {GOAL:.0%} of the teacher's cgF1 in every world and seed {verdict}, least {least:.1%}"
        )
    sheet.say("Not measured: exemplar boxes, photographs, the published SAM 3.")
    sheet.save(args.out, {"seeds": seeds})


if __name__ == "__main__":
    main()
