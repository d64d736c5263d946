"""Two gloo ranks under torchrun compared with one process at the same global batch: losses step by step.

    python benchmarks/two_ranks.py                                  # the engine's toy task, seconds
    python benchmarks/two_ranks.py CONFIG [key=value ...]           # a real recipe through `samdistill train`

The script prints the largest difference per loss term and fails above 1e-4. ``--out FILE`` stores the result. Both run
on the CPU. Results of a student that draws random numbers (dropout, drop path) differ: switch that off.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Sheet, use_device

from samdistill.engine import read_lines

HERE = Path(__file__).resolve().parent
TOY = HERE.parent / "tests" / "engine" / "toy_task.py"
LIMIT = 1e-4


def command(config: str | None, overrides: list[str], run: Path, ranks: int) -> list[str]:
    """One training run on ``ranks`` processes that logs every step into ``run``."""
    if config is None:
        return [sys.executable, str(TOY), str(run), "--nproc", str(ranks), "dropout=0", "epochs=5", *overrides]
    settings = [*overrides, f"output={run}", "train.log_every=1"]
    return [sys.executable, "-m", "samdistill", "train", config, *settings, "--nproc", str(ranks)]


def measure(config: str | None, overrides: list[str]) -> dict[str, Any]:
    """Both runs and, per term, the largest absolute difference over all steps."""
    logged, seconds = [], []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            run, start = Path(folder) / str(ranks), time.perf_counter()
            subprocess.run(command(config, overrides, run, ranks), check=True, env=environment)
            seconds.append(round(time.perf_counter() - start, 1))
            logged.append([line["terms"] for line in read_lines(run / "metrics.jsonl") if "terms" in line])
    one, two = logged
    differences = {name: [abs(a[name] - b[name]) for a, b in zip(one, two, strict=True)] for name in one[0]}
    by_step = {name: [d / abs(a[name]) for d, a in zip(differences[name], one, strict=True)] for name in one[0]}
    relative = {name: max(found) for name, found in by_step.items()}
    within = next((i for i, _ in enumerate(one) if any(d[i] > LIMIT for d in differences.values())), len(one))
    return {
        "config": config or "toy", "overrides": overrides, "steps": len(one),
        "largest_difference": {name: max(found) for name, found in differences.items()},
        "at_step_1": {name: found[0] for name, found in differences.items()},
        "largest_relative": relative,
        "relative_by_step": by_step,
        "losses_of_step_1": one[0], "steps_within_limit": within, "limit": LIMIT,
        "seconds": {"one process": seconds[0], "two ranks": seconds[1]},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a recipe; left out, the toy task")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, help="write what is printed there, and the figures to a .json beside it")
    arguments = parser.parse_args()
    sheet = Sheet(use_device("cpu"))
    figures = measure(arguments.config, arguments.overrides)
    rows = [
        [name, f"{figures['losses_of_step_1'][name]:.4g}", f"{figures['at_step_1'][name]:.2e}", f"{value:.2e}",
         f"{figures['largest_relative'][name]:.2e}"]
        for name, value in figures["largest_difference"].items()
    ]  # fmt: skip
    title = f"{figures['config']}: {figures['steps']} steps, two gloo ranks against one process, same global batch"
    sheet.table(title, ["loss term", "at step 1", "difference at step 1", "largest", "largest relative"], rows)
    steps = [n for n in (1, 2, 3, 5, 10, 20, 40) if n <= figures["steps"]]
    grown = [[name, *(f"{found[n - 1]:.1e}" for n in steps)] for name, found in figures["relative_by_step"].items()]
    sheet.table("relative difference at step", ["loss term", *map(str, steps)], grown)
    sheet.say(f"first {figures['steps_within_limit']} step(s) within {LIMIT:g} in every term; {figures['seconds']} s")
    sheet.save(arguments.out, figures)
    return int(max(figures["largest_difference"].values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
