"""Ablation of the detection job: each term left out, another matching, other targets, a single phase.

    python benchmarks/detection_terms.py --jobs 2 --out benchmarks/results/detection_terms.txt
    python benchmarks/detection_terms.py --only all,"no mask",greedy --seeds 1    # some variants now, the others later

The sandbox recipe on rendered scenes. Each variant has the same seeds and is evaluated on held-out phrases:

    all          the recipe: eight terms, three phases (align: fpn alone; features: all terms; outputs: six)
    no X         term X has weight 0 and is left out of all phases. Without fpn the phase align trains nothing; it is
                 dropped, and its epochs are not added to another phase
    no align     all eight terms without the phase align: the baseline of "no fpn"
    greedy       match.method=greedy
    no negatives loss.unmatched=false: queries without a partner are not taught "no object"
    floor F      match.floor=F: teacher queries with a lower score are not targets
    no phases    one phase of the same total length with all terms, at the learning rates of the phase features

Every training and every evaluation runs in its own process. Finished ones in --work are not repeated, and an
interrupted training is resumed after its last epoch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Sheet, arguments, run_python, setting, use_device
from study import Trainings, say_differences, say_figures

import samdistill
from samdistill.dist import default_device
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.loading import load_config

RECIPE = "detection/sandbox"
BASELINE, FPN = "all", "fpn"
MEASURES = {"cgF1": "cgf1", "pmF1": "pmf1", "IL_MCC": "il_mcc", "mask AP": "mask_ap"}
TEACHER = "teacher"
Phases = list[dict[str, Any]]


def recipe_phases(epochs: Sequence[int] | None, scenes: int, overrides: Sequence[str]) -> Phases:
    """The recipe's phases, with other numbers of epochs where they are given; at most a quarter is warm-up."""
    train = load_config(RECIPE, overrides).train
    phases = [phase.model_dump() for phase in train.phases or ()]
    epochs = [phase["epochs"] for phase in phases] if epochs is None else epochs
    if len(epochs) != len(phases):
        raise SystemExit(f"--epochs: one number for each of the phases {', '.join(p['name'] for p in phases)}")
    found = []
    for phase, count in zip(phases, epochs, strict=True):
        steps = count * (scenes // train.batch_size)
        found.append({**phase, "epochs": count, "warmup_steps": min(phase["warmup_steps"], steps // 4)})
    return found


def without(phases: Phases, removed: str) -> Phases:
    """Phases that train every term they had but ``removed``; those that have none left are dropped."""
    left = []
    for phase in phases:
        terms = [t for t in phase["terms"] or DetectionRunConfig.term_names() if t != removed]
        left += [{**phase, "terms": terms}] if terms else []
    return left


def variants(phases: Phases) -> dict[str, list[str]]:
    """Overrides of the recipe by name."""

    def schedule(chosen: Phases) -> str:
        return f"train.phases={json.dumps(chosen)}"

    align = [phase for phase in phases if phase["terms"] is not None and tuple(phase["terms"]) == (FPN,)]
    every = max(phases, key=lambda phase: len(phase["terms"] or DetectionRunConfig.term_names()))
    one = {**every, "name": "one", "epochs": sum(phase["epochs"] for phase in phases), "terms": None}
    whole = schedule(phases)
    found = {BASELINE: [whole]}
    found |= {f"no {t}": [schedule(without(phases, t)), f"loss.{t}=0.0"] for t in DetectionRunConfig.term_names()}
    if align:
        found["no align"] = [schedule([phase for phase in phases if phase not in align])]
    return found | {
        "greedy": [whole, "match.method=greedy"],
        "no negatives": [whole, "loss.unmatched=false"],
        "floor 0": [whole, "match.floor=0.0"],
        "floor 0.6": [whole, "match.floor=0.6"],
        "no phases": [schedule([one])],
    }


def concept_study(args: argparse.Namespace, chosen: dict[str, list[str]]) -> Trainings:
    """The chosen variants on rendered scenes, which are drawn first, beside the recipe's teacher."""
    work = args.work.resolve()
    data = work / f"scenes-{args.scenes}-{args.val}"
    samdistill.render_sandbox(data, train=args.scenes, val=args.val, format="coco", progress=False)
    seeds, base = range(args.first_seed, args.first_seed + args.seeds), ["data.workers=0", *args.overrides]
    teacher = load_config(RECIPE, base).teacher.path

    def measure(model: str, kept: Path) -> None:
        words = [__file__, "--child", model, str(data), str(kept), *base]
        run_python(words, work / "logs" / f"evaluated-{kept.stem}.txt", 1)

    return Trainings(
        RECIPE, work, chosen, list(seeds), measure, [*base, setting("data.root", data)], {TEACHER: teacher}, args.jobs,
        last="student/tokenizer.json",  # a student without it cannot be asked
    )  # fmt: skip


def evaluate_child(model: str, data: Path, kept: Path, overrides: Sequence[str]) -> None:
    """A run or a detector's folder on all held-out questions; leaves the figures in ``kept``."""
    from samdistill.data.saco import ConceptSet, find_concepts
    from samdistill.evaluation.concepts import evaluate_concepts
    from samdistill.inference.concepts import load_concept_model

    config, place = load_config(RECIPE, [*overrides, setting("data.root", data)]), find_concepts(data)
    assert isinstance(config, DetectionRunConfig) and place is not None
    settings = config.evaluate
    found = evaluate_concepts(
        {Path(model).name: load_concept_model(model, device=default_device())}, ConceptSet.load(place),
        geometry=config.data.geometry, threshold=settings.threshold, batch_size=settings.batch_size, pictures=0,
        repeats=0,
    )  # fmt: skip
    kept.write_text(json.dumps(found.to_dict()))


def say(sheet: Sheet, study: Trainings, args: argparse.Namespace) -> None:
    """Conditions, all figures, and each variant against the baseline."""
    config, one = study.config(BASELINE, study.seeds[0]), study.result(TEACHER)
    assert isinstance(config, DetectionRunConfig)
    phases = ", ".join(f"{phase.name} {phase.epochs}" for phase in config.train.phases or ())
    seeds = ", ".join(map(str, study.seeds))
    sheet.say()
    sheet.say(
        f"teacher {config.teacher.path!r}, student {config.student.backbone} with {config.student.queries} queries, "
        f"{args.scenes} scenes, batches of {config.train.batch_size}, epochs: {phases}; seeds {seeds}; 1 thread per "
        f"training, {study.jobs} at a time"
    )
    if config.student.start is not None:
        sheet.say(
            "all variants and seeds go on from one student whose vision encoder was aligned with the teacher's before, "
            "by the recipe's phase align alone: a term is missed in what follows, not in that phase"
        )
    sheet.say(
        f"held out: {one['questions']} questions about {one['images']} scenes, {one['positives']} of them for "
        f"something that is there; scores from {one['threshold']:g}"
    )
    say_figures(sheet, study, MEASURES)
    compared = [(name, BASELINE) for name in study.variants if name != BASELINE]
    if {f"no {FPN}", "no align"} <= study.variants.keys():
        compared.append((f"no {FPN}", "no align"))
    say_differences(sheet, study, MEASURES, compared)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "detection_terms")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all trainings")
    parser.add_argument("--only", help="variants, separated by commas; 'all' is always among them")
    parser.add_argument("--scenes", type=int, default=2000, help="rendered scenes to train on (2000)")
    parser.add_argument("--val", type=int, default=128, help="held-out scenes, four questions each (128)")
    parser.add_argument("--epochs", help="of each phase, such as 3,1,1 (the recipe's)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--first-seed", type=int, default=0, help="to do some seeds now and others later (0)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each (1)")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        model, data, kept, *overrides = sys.argv[2:]
        evaluate_child(model, Path(data), Path(kept), overrides)
        return
    args = parse()
    epochs = None if args.epochs is None else [int(text) for text in args.epochs.split(",")]
    chosen = variants(recipe_phases(epochs, args.scenes, args.overrides))
    if args.only is not None:
        names = [BASELINE, *(name.strip() for name in args.only.split(","))]
        if unknown := [name for name in names if name not in chosen]:
            raise SystemExit(f"--only: no variant is called {unknown[0]!r}; there is: {', '.join(chosen)}")
        chosen = {name: overrides for name, overrides in chosen.items() if name in names}
    device = use_device(args.device)
    sheet = Sheet(device)
    study = concept_study(args, chosen)
    study.run()
    say(sheet, study, args)
    sheet.say()
    if "no align" in chosen:
        sheet.say(
            '"no fpn" loses the phase align too, and its epochs are given to nobody; "no align" has the same steps '
            'with the term. A step of align asks nobody anything and is the cheapest, so "no phases" takes as many '
            "steps but more time."
        )
    sheet.say('"no X": weight 0 and out of every phase. Weights of the other terms are not tuned again.')
    sheet.say(
        "Not measured: exemplar boxes, photographs and the real SAM 3, longer trainings, other weights. The spread "
        "covers initialisation, order, augmentation and questions; teacher and scenes stay the same."
    )
    sheet.save(args.out, {"scenes": args.scenes, "held_out": args.val, **study.to_dict()})


if __name__ == "__main__":
    main()
