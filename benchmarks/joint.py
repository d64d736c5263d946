"""What does each choice change in joint fine-tuning of a hosted student with a small text encoder?

    python benchmarks/joint.py --out benchmarks/results/joint.txt

The start of a seed is a student of the recipe detection/hosted_sandbox after a quarter of its epochs, with the text
encoder of the recipe text/sandbox, so that there is something left to learn. The recipe detection/hosted_joint_sandbox
then trains both encoders for one epoch, as it is and with one choice changed. All are measured on questions about
scenes of two worlds that no training has seen. Finished trainings and measurements are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hosted
from common import Sheet, arguments, run_python, setting, train_once, use_device
from study import Trainings, say_differences, say_figures

import samdistill
from samdistill.checkpoints.report import sidecar
from samdistill.data.saco import ConceptSet, find_concepts
from samdistill.evaluation.concepts import evaluate_concepts
from samdistill.inference.concepts import load_concept_model
from samdistill.io import write_json

BASELINE, TEACHER = "the recipe", "teacher"
HEADS = ["geometry_encoder.*", "detr_encoder.*", "detr_decoder.*", "mask_decoder.*", "dot_product_scoring.*"]
LABELS = {"label_mask": 200.0, "label_dice": 10.0, "label_box_l1": 5.0, "label_giou": 2.0, "label_score": 20.0,
          "label_presence": 10.0}  # fmt: skip
"""Terms of labels with the weights of SAM 3's training."""
PHASE: dict[str, Any] = {"name": "joint", "epochs": 1, "lr": 5e-4, "warmup_steps": 25}
VARIANTS: dict[str, list[str]] = {
    BASELINE: [],
    "pairs by cost": ["match.method=hungarian"],
    "presence as BCE": ["loss.presence=0.0", "loss.presence_bce=1.0"],
    "features in units of their deviation": ["loss.standardise=true"],
    "outputs alone": ["loss.fpn=0.0", "loss.encoder=0.0"],
    "features alone": [f"loss.{name}=0.0" for name in ("mask", "box_l1", "giou", "logit", "presence", "semantic")],
    "labels too": [f"loss.{name}={weight}" for name, weight in LABELS.items()],
    "labels at a tenth of their weights": [f"loss.{name}={weight / 10}" for name, weight in LABELS.items()],
    "labels alone": [
        *(f"loss.{name}={weight}" for name, weight in LABELS.items()),
        f"train.phases={json.dumps([PHASE | {'terms': list(LABELS)}])}",
    ],
    "neck trains too": [f"train.freeze={json.dumps([{'match': HEADS}])}"],
}
MEASURES = {
    f"{title}, world {world}": f"worlds.{world}.{key}"
    for world in hosted.WORLDS
    for title, key in (("cgF1", "cgf1"), ("mask AP", "mask_ap"))
}
GAPS = {f"cgF1, world {world}": f"worlds.{world}.cgf1" for world in hosted.WORLDS}
SHARE = 4
"""The start has one of this number of the recipe's epochs."""


def begin(args: argparse.Namespace, seed: int) -> Path:
    """Train a trunk and a text encoder, and return the folder of the student that starts from both."""
    run, start = args.work / f"trunk-seed{seed}", args.work / f"start-seed{seed}"
    (phase,) = hosted.recipe_phases()
    settings = [
        setting("output", run), setting("data.root", args.work / "scenes"), "data.workers=0", f"train.seed={seed}",
        f"data.seed={seed}", f"train.phases={json.dumps([phase | {'epochs': phase['epochs'] // SHARE}])}",
    ]  # fmt: skip
    train_once(hosted.RECIPE, settings, args.work / f"{run.name}.txt", 1, "student/tokenizer.json")
    text = hosted.train_text(args, seed)
    if not sidecar(start).is_file():
        samdistill.merge(text, run / "student", start)
    return start


def figures(model: str, work: Path, kept: Path) -> None:
    """Write the figures of a model in both worlds."""
    worlds = {}
    for world in hosted.WORLDS:
        listing = find_concepts(work / f"world{world}")
        assert listing is not None
        found = evaluate_concepts(
            {"model": load_concept_model(model)}, ConceptSet.load(listing), batch_size=8, pictures=0, repeats=0
        )
        worlds[str(world)] = found.to_dict()["models"][0]
    write_json(kept, {"models": [{"worlds": worlds}]})


def study(args: argparse.Namespace) -> Trainings:
    """Return the study. Its starts are trained first."""
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    starts = {f"start, seed {seed}": str(begin(args, seed)) for seed in seeds}

    def measure(model: str, kept: Path) -> None:
        run_python([__file__, "--child", model, str(args.work), str(kept)], args.work / "measured.txt", 1)

    base = [
        "data.workers=0", setting("data.root", args.work / "scenes"),
        setting("student.start", args.work / "start-seed{seed}"),
        setting("student.text_encoder", args.work / "text-seed{seed}"), f"train.phases={json.dumps([PHASE])}",
    ]  # fmt: skip
    chosen = {name: VARIANTS[name] for name in VARIANTS if args.only is None or name in args.only}
    return Trainings(
        hosted.JOINT, args.work, chosen, list(seeds), measure, base, {TEACHER: "sandbox", **starts}, args.jobs,
        last="student/tokenizer.json",
    )  # fmt: skip


def say(sheet: Sheet, found: Trainings) -> None:
    """Print the tables."""
    say_figures(sheet, found, MEASURES, ".3f")
    say_differences(sheet, found, GAPS, [(name, BASELINE) for name in found.variants if name != BASELINE], ".3f")
    sheet.say()
    sheet.say("Two seeds do not separate differences below about 0.02; the learning rate is the recipe's in all rows.")


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "joint")
    parser.add_argument("--only", type=lambda text: text.split(","), help="variants, with commas between them")
    parser.add_argument("--scenes", type=int, default=128, help="scenes of each fresh world (128)")
    parser.add_argument("--seeds", type=int, default=2, help="how many (2)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    return parser.parse_args()


def main(words: Sequence[str]) -> None:
    if words[:1] == ["--child"]:
        return figures(words[1], Path(words[2]), Path(words[3]))
    args = parse()
    sheet = Sheet(use_device(args.device))
    args.work = args.work.resolve()
    hosted.render(args)
    found = study(args)
    found.run()
    say(sheet, found)
    sheet.save(args.out, found.to_dict())
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
