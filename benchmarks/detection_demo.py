"""The detection demo with several seeds: what share of the teacher's cgF1 the student keeps, and what it takes.

    python benchmarks/detection_demo.py --out benchmarks/results/detection_demo.txt

Every seed is the whole demo of the detection job in a process and a folder of its own, with ``train.seed``
(initialisation, order) and ``data.seed`` (augmentation, questions) set, evaluated on all held-out questions. Stages are
timed by the lines that the demo prints. A seed that is finished is not done again; one that was cut off goes on, and
its seconds are then left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from common import Sheet, arguments, spread, use_device
from demo import timed

from samdistill.engine import read_lines

GOAL_STUDENT, GOAL_SECONDS = 0.90, 300
MODELS = ("teacher", "untrained", "distilled")
STAGES = {"render": "render", "plan": "plan + check", "train": "train", "evaluate": "evaluate + report"}
MEASURES = {"cgF1": "cgf1", "pmF1": "pmf1", "IL_MCC": "il_mcc", "F1 at IoU 0.50": "f1_50", "mask AP": "mask_ap"}


def one_seed(seed: int, work: Path, overrides: list[str], keep: bool) -> dict[str, Any]:
    """Run the demo, or read what an earlier call left; figures by model, seconds by stage."""
    kept, folder = work / f"seed{seed}.json", work / f"seed{seed}"
    if kept.is_file():
        run = json.loads(kept.read_text())
        if run["overrides"] != overrides:
            raise SystemExit(f"{kept}: of other settings ({' '.join(run['overrides'])}); give another --work")
        return run
    whole = not folder.exists()
    words = [f"train.seed={seed}", f"data.seed={seed}", "evaluate.images=null", *overrides]
    seconds = timed([sys.executable, __file__, "--child", str(folder), *words], STAGES)
    found = json.loads((folder / "run" / "evaluation.json").read_text())
    last = read_lines(folder / "run" / "metrics.jsonl")[-1]
    run = {
        "seed": seed, "overrides": overrides, "models": {model["name"]: model for model in found["models"]},
        **{name: found[name] for name in ("images", "questions", "positives", "threshold")},
        "steps": last["step"], "seconds": seconds if whole else None, "of which training steps": last["seconds"],
    }  # fmt: skip
    kept.write_text(json.dumps(run, indent=1))
    if not keep:
        shutil.rmtree(folder)
    return run


def say_quality(sheet: Sheet, runs: list[dict[str, Any]]) -> list[float]:
    """Every measure of the three models; the shares of the teacher, seed by seed."""
    one = runs[0]
    rows = []
    for title, measure in MEASURES.items():
        rows.append([title, *(spread([run["models"][name][measure] for run in runs]) for name in MODELS)])
    shares = {name: [run["models"][name]["kept"] or 0.0 for run in runs] for name in MODELS[1:]}
    rows.append(["share of the teacher's cgF1", "", *(spread(values) for values in shares.values())])
    sheet.table(
        f"{one['questions']} questions about {one['images']} held-out scenes, {one['positives']} of them for something "
        f"that is there; scores from {one['threshold']:g}; {one['steps']} steps; mean +- standard deviation over seeds "
        f"{', '.join(str(run['seed']) for run in runs)}",
        ["", *MODELS],
        rows,
    )
    pairs = zip(*shares.values(), strict=True)
    by_seed = [[str(run["seed"]), *(f"{v:.2%}" for v in pair)] for run, pair in zip(runs, pairs, strict=True)]
    sheet.table("share of the teacher's cgF1 by seed", ["seed", *MODELS[1:]], by_seed)
    return shares["distilled"]


def say_seconds(sheet: Sheet, runs: list[dict[str, Any]]) -> None:
    timed_runs = [run for run in runs if run["seconds"] is not None]
    rows = []
    if timed_runs:
        stages = list(timed_runs[0]["seconds"])
        rows = [[name, spread([run["seconds"][name] for run in timed_runs], ".1f")] for name in stages]
    rows.append(["of which training steps", spread([run["of which training steps"] for run in runs], ".1f")])
    sheet.table(f"seconds by the wall clock, {len(timed_runs)} of {len(runs)} seeds", ["", "mean +- sd"], rows)
    if len(timed_runs) < len(runs):
        sheet.say("the other seeds were cut off and went on, so their stages were not timed as a whole")
    if timed_runs:
        worst = max(run["seconds"]["whole"] for run in timed_runs)
        verdict = "met" if worst <= GOAL_SECONDS else "MISSED"
        sheet.say(f"goal: at most {GOAL_SECONDS} s after the install: {verdict} (longest {worst:.1f} s)")


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "detection_demo_seeds")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the demo's recipe")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the runs and their reports")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        from samdistill.verbs.detection_road import demo_detection

        folder, *overrides = sys.argv[2:]
        print(demo_detection(Path(folder), overrides=overrides).summary())
        return
    args = parse()
    device = use_device(args.device)
    sheet = Sheet(device)
    args.work.mkdir(parents=True, exist_ok=True)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [one_seed(seed, args.work, args.overrides, args.keep) for seed in seeds]
    shares = say_quality(sheet, runs)
    sheet.say(
        f"goal: distilled at least {GOAL_STUDENT:.0%} of the teacher's cgF1: "
        f"{'met' if statistics.fmean(shares) >= GOAL_STUDENT else 'MISSED'} on average "
        f"({statistics.fmean(shares):.2%}, lowest {min(shares):.2%})"
    )
    say_seconds(sheet, runs)
    sheet.say()
    sheet.say(
        "Not measured: exemplar boxes, other scenes than those of the demo's own world, photographs, an installation. "
        "Teacher and scenes are the same for every seed, so the teacher's figures do not spread."
    )
    sheet.save(args.out, {"runs": runs, "goal": {"share": GOAL_STUDENT, "seconds": GOAL_SECONDS}})


if __name__ == "__main__":
    main()
