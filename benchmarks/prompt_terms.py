"""Ablation of the prompt job: each term alone, all four, two teachers, corrective clicks in the training loop.

    python benchmarks/prompt_terms.py --jobs 2 --out benchmarks/results/prompt_terms.txt
    python benchmarks/prompt_terms.py --only "all four,two teachers" --seeds 1    # some variants now, the others later
    python benchmarks/prompt_terms.py --scenes 16 --val 4 --epochs 1 --seeds 1    # to try this script

The sandbox recipe with equal steps. Each variant has the same seeds and is measured on held-out scenes:

    task only               no teacher
    + TERM                  the task and this one term from one teacher, at the recipe's weights
    all four                the task and all four terms
    recipe                  the recipe's terms, if these are not all four
    published               all four with the published weights of terms and task, if the recipe has others
    two teachers            all four, from the tiny SAM with weight 0.7 and from the tiny MobileSAM with 0.3
    task only in the loop   no teacher; two corrective clicks after the first prompt
    all four in the loop    all four terms on the first prediction, and two corrective clicks after it
    all rounds in the loop  all four terms in every round
    NAME                    all four, with the settings of ``--variant NAME key=value ...``

Teachers and student were trained on the sandbox's standard scenes. The scenes used here have more and smaller objects,
as the photographs of a user differ from SAM's. Every training and every measurement runs in its own process. Finished
ones in --work are not repeated, and an interrupted training is resumed after its last epoch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from common import Sheet, arguments, run_python, setting, use_device
from study import Trainings, say_differences, say_figures

import samdistill
from samdistill.inference.prompting import KINDS
from samdistill.jobs.loading import load_config
from samdistill.jobs.prompt.config import PromptRunConfig
from samdistill.jobs.prompt.losses import DISTILLED_TERMS
from samdistill.sandbox.scenes import SceneStyle
from samdistill.sandbox.write import write_coco

RECIPE, PUBLISHED = "prompt/sandbox", "prompt/published"
TASK, ALL, LOOP = "task only", "all four", "in the loop"
ROUNDS = f"all rounds {LOOP}"
MEASURES = {
    "box": "miou.box", "centre point": "miou.point", "point + 1 click": "miou.refine",
    "point + 2 clicks": "miou.refine2",
}  # fmt: skip
TERMS = tuple(DISTILLED_TERMS.weights)
SAM, MOBILE = ({"name": name, "checkpoint": f"sandbox-{name}"} for name in ("sam", "mobile"))
WORLD, SIZE, SEED = SceneStyle(max_objects=8, min_objects=3, min_radius=0.06, max_radius=0.16), 168, 30


def render(root: Path, train: int, val: int) -> Path:
    """``root`` with that many scenes of two worlds that no model of the sandbox has seen, as COCO; drawn once."""
    for seed, (split, count) in enumerate({"train": train, "val": val}.items(), SEED):
        if not (root / "annotations" / f"instances_{split}.json").is_file():
            write_coco(root, count, SIZE, seed, split, WORLD)
    return root


def taught(*terms: str) -> list[str]:
    """Overrides that teach these terms and no other."""
    on = [f"distillation.{name}.enable={json.dumps(name in terms)}" for name in TERMS]
    return [f"distillation.enable={json.dumps(bool(terms))}", *on]


def teachers(*entries: Mapping[str, object]) -> str:
    return f"teachers={json.dumps(entries)}"


def published(config: PromptRunConfig) -> list[str]:
    """Overrides that put the published weights, of the terms and of the task, in the place of the recipe's; none where
    they are the same."""
    ours, theirs = (run.model_dump(mode="json") for run in (config, load_config(PUBLISHED)))
    for name in TERMS:
        ours["distillation"][name]["enable"] = True
    keys = [("distillation", key) for key in ("lambda_coef", *TERMS)] + [("loss", key) for key in theirs["loss"]]
    return [f"{a}.{b}={json.dumps(theirs[a][b])}" for a, b in keys if ours[a][b] != theirs[a][b]]


def variants(config: PromptRunConfig, others: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Overrides of the recipe by name. others: name and overrides of further variants."""
    every, loop = taught(*TERMS), "prompts.rounds=2"
    found = {TASK: taught(), **{f"+ {name}": taught(name) for name in TERMS}, ALL: every}
    if config.distilled != TERMS:
        found["recipe"] = taught(*config.distilled)
    if weights := published(config):
        found["published"] = [*every, *weights]
    return found | {
        "two teachers": [*every, teachers({**SAM, "weight": 0.7}, {**MOBILE, "weight": 0.3})],
        f"{TASK} {LOOP}": [*taught(), loop],
        f"{ALL} {LOOP}": [*every, loop, "distillation.rounds=first"],
        ROUNDS: [*every, loop],
        **{name: [*every, *overrides] for name, *overrides in others},
    }


def pairs(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each variant with what it has to be compared with, as far as both are there."""
    for name in names:
        if name == ALL or name.startswith("+ ") or name == f"{TASK} {LOOP}":
            yield name, TASK
        elif name != TASK and ALL in names:
            yield name, ALL
    for name in (f"{ALL} {LOOP}", ROUNDS):
        if {name, f"{TASK} {LOOP}"} <= set(names):
            yield name, f"{TASK} {LOOP}"


def prompt_study(args: argparse.Namespace, chosen: dict[str, list[str]], data: Path, base: Sequence[str]) -> Trainings:
    """The chosen variants, measured on the held-out scenes of ``data`` beside the recipe's student as it comes and its
    teachers."""
    work = args.work.resolve()
    config = recipe([*base, *args.overrides])
    models = {"untuned": str(config.student.start)} | {f"teacher {t.name}": t.checkpoint for t in config.teachers}

    def measure(model: str, kept: Path) -> None:
        run_python([__file__, "--child", model, str(data), str(kept)], work / "logs" / f"{kept.stem}-measured.txt", 1)

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    settings = [
        "data.workers=0", "evaluate.batch_size=2", "train.batch_size=8", f"train.epochs={args.epochs}", *base,
        *args.overrides,
    ]  # fmt: skip
    return Trainings(RECIPE, work, chosen, list(seeds), measure, settings, models, args.jobs)


def recipe(overrides: Sequence[str]) -> PromptRunConfig:
    config = load_config(RECIPE, overrides)
    assert isinstance(config, PromptRunConfig)
    return config


def measure_child(model: str, data: Path, kept: Path) -> None:
    """mIoU of a run or of a model's folder or name, by kind of prompt; leaves all figures in ``kept``."""
    found = samdistill.evaluate(Path(model), data, prompts=KINDS, batch_size=16, progress=False)
    kept.write_text(json.dumps(found.to_dict()))


def say_conditions(sheet: Sheet, study: Trainings) -> None:
    """What was held equal."""
    first = next(iter(study.variants))
    config, one = study.config(first, study.seeds[0]), study.result("untuned")
    assert isinstance(config, PromptRunConfig)
    steps = sorted({study.trained(name)[0] for name in study.variants})
    student = Path(config.student.start or "").name
    style = ", ".join(f"{name} {value:g}" for name, value in asdict(WORLD).items())
    sheet.say()
    sheet.say(
        f"student {student!r}, {'/'.join(map(str, steps))} steps of {config.train.batch_size} images "
        f"with {config.prompts.objects} objects each, prompts {config.prompts.mode}; seeds "
        f"{', '.join(map(str, study.seeds))}; 1 thread per training, {study.jobs} at a time"
    )
    sheet.say(f"scenes of {SIZE} px: {style}; held out: {one['images']} scenes, {one['objects']} objects")


def arguments_of(doc: str | None, work: str) -> argparse.ArgumentParser:
    """What both studies of the prompt job take."""
    parser = arguments(doc, work)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all trainings")
    parser.add_argument("--val", type=int, default=192, help="held-out scenes (192)")
    parser.add_argument("--epochs", type=int, default=6, help="(6)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--first-seed", type=int, default=0, help="to do some seeds now and others later (0)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each (1)")
    return parser


def parse() -> argparse.Namespace:
    parser = arguments_of(__doc__, "prompt_terms")
    parser.add_argument("--scenes", type=int, default=256, help="rendered scenes to train on (256)")
    parser.add_argument("--only", help=f"variants, separated by commas; {TASK!r} is always among them")
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar=("NAME", "key=value"),
                        help="one more: all four terms with these settings; repeatable")  # fmt: skip
    return parser.parse_args()


def chosen_variants(args: argparse.Namespace, base: Sequence[str]) -> dict[str, list[str]]:
    found = variants(recipe([*base, *args.overrides]), args.variant)
    if args.only is None:
        return found
    names = [TASK, *(name.strip() for name in args.only.split(","))]
    if unknown := [name for name in names if name not in found]:
        raise SystemExit(f"--only: no variant is called {unknown[0]!r}; there is: {', '.join(found)}")
    return {name: overrides for name, overrides in found.items() if name in names}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        model, data, kept = sys.argv[2:]
        measure_child(model, Path(data), Path(kept))
        return
    args = parse()
    device = use_device(args.device)
    sheet = Sheet(device)
    data = render(args.work.resolve() / f"scenes-{args.scenes}-{args.val}", args.scenes, args.val)
    base = [setting("data.root", data), "data.kind=coco", teachers(SAM), "prompts.rounds=0"]
    study = prompt_study(args, chosen_variants(args, base), data, base)
    study.run()
    say_conditions(sheet, study)
    say_figures(sheet, study, MEASURES)
    say_differences(sheet, study, MEASURES, list(pairs(list(study.variants))))
    sheet.say()
    sheet.say(
        "mIoU with ground truth. One teacher is the tiny SAM, in the role of SAM-H. Weights of the terms that are left "
        "are not tuned again. A step in the loop asks three times and costs more; steps are equal, seconds are not."
    )
    sheet.say(
        "Not measured: photographs, published weights, other students, longer trainings. The spread covers order, "
        "views, prompts and the adapters' start; student, teachers and scenes stay the same."
    )
    sheet.save(args.out, {"scenes": args.scenes, "held_out": args.val, "world": asdict(WORLD), **study.to_dict()})


if __name__ == "__main__":
    main()
