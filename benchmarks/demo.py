"""The demo with several seeds: fraction of the teacher's box mIoU that the student reaches, and time per stage.

    python benchmarks/demo.py --out benchmarks/results/demo.txt

Each seed is a complete ``samdistill.demo`` in its own process and folder, with ``train.seed`` (initialisation, order)
and ``data.seed`` (augmentation) set. The time of a stage is taken from the lines that the demo prints.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Sheet, arguments, spread, use_device

from samdistill import demo
from samdistill.engine import read_lines

GOAL_STUDENT, GOAL_UNTRAINED, GOAL_SECONDS = 0.92, 0.50, 300
STAGES = {"render": "render + plan", "cache": "cache + check", "train": "train + merge",
          "evaluate": "evaluate + report"}  # fmt: skip
"""First word of the line that opens a stage, and what is done until the next one opens."""


def timed(words: Sequence[str], stages: Mapping[str, str]) -> dict[str, float]:
    """Run ``words``; seconds by stage, and of the whole. stages: first word of a line that opens a stage, its name."""
    start = time.monotonic()
    opened: list[tuple[str, float]] = [("start", 0.0)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            word = line.partition(" ")[0]
            if word in stages:
                opened.append((stages[word], time.monotonic() - start))
    if child.returncode:
        raise SystemExit(f"{shlex.join(words)} ended with {child.returncode}")
    ends = [*(at for _, at in opened[1:]), time.monotonic() - start]
    return {name: end - at for (name, at), end in zip(opened, ends, strict=True)} | {"whole": ends[-1]}


def one_seed(seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Run the demo; shares of the teacher's mIoU by model and prompt, seconds by stage."""
    words = [sys.executable, __file__, "--child", str(folder), f"train.seed={seed}", f"data.seed={seed}", *overrides]
    seconds = timed(words, STAGES)
    found = json.loads((folder / "run" / "evaluation.json").read_text())
    models = {model["name"]: model for model in found["models"]}
    return {
        "seed": seed, "models": models, "objects": found["objects"], "images": found["images"],
        "seconds": seconds,
        "of which training steps": read_lines(folder / "run" / "metrics.jsonl")[-1]["seconds"],
    }  # fmt: skip


def say(sheet: Sheet, runs: list[dict[str, Any]]) -> None:
    """One line per seed, then the seconds."""
    kept = {name: [run["models"][name]["kept"]["box"] for run in runs] for name in ("distilled", "untrained")}
    rows = []
    for run, student, untrained in zip(runs, kept["distilled"], kept["untrained"], strict=True):
        teacher = run["models"]["teacher"]["miou"]["box"]
        rows.append([str(run["seed"]), f"{teacher:.4f}", f"{student:.2%}", f"{untrained:.2%}"])
    if len(runs) > 1:
        both = (f"{statistics.fmean(v):.2%} +- {statistics.stdev(v):.2%}" for v in kept.values())
        rows.append(["mean +- sd", "", *both])
    where = f"{runs[0]['images']} held-out scenes, {runs[0]['objects']} objects"
    sheet.table(f"share of the teacher's box mIoU, {where}", ["seed", "teacher's mIoU", "distilled", "untrained"], rows)
    sheet.say(
        f"goals: distilled at least {GOAL_STUDENT:.0%} (lowest {min(kept['distilled']):.2%}), untrained under "
        f"{GOAL_UNTRAINED:.0%} (highest {max(kept['untrained']):.2%})"
    )
    stages = list(runs[0]["seconds"])
    rows = [[name, spread([run["seconds"][name] for run in runs], ".1f")] for name in stages]
    rows.append(["of which training steps", spread([run["of which training steps"] for run in runs], ".1f")])
    sheet.table("seconds by the wall clock", ["", "mean +- sd"], rows)
    worst = max(run["seconds"]["whole"] for run in runs)
    sheet.say(f"goal: at most {GOAL_SECONDS} s after the install (longest {worst:.1f} s)")


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "demo_seeds")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the demo's recipe")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the runs and their reports")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        folder, *overrides = sys.argv[2:]
        print(demo(Path(folder), overrides=overrides).summary())
        return
    args = parse()
    device = use_device(args.device)
    sheet = Sheet(device)
    runs = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        folder = args.work / f"seed{seed}"
        if folder.exists():
            raise SystemExit(f"{folder}: exists, and a finished stage takes no time; remove it or give another --work")
        runs.append(one_seed(seed, folder, args.overrides))
        if not args.keep:
            shutil.rmtree(folder)
    say(sheet, runs)
    sheet.say()
    sheet.say("Not measured: other scenes than those of the demo's own seed, real photographs, an installation.")
    sheet.save(args.out, {"runs": runs})


if __name__ == "__main__":
    main()
