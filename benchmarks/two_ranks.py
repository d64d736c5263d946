"""Two gloo ranks under torchrun against one process at the same global batch: losses step by step.

    python benchmarks/two_ranks.py                                  # the engine's toy task, seconds
    python benchmarks/two_ranks.py CONFIG [key=value ...]           # a real recipe through `samdistill train`

Prints the largest difference per loss term and writes it, with the hardware, to ``results/two_ranks.json``; fails above
1e-4. A student that draws random numbers (dropout, drop path) cannot agree: switch that off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

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
    worst = {name: max(abs(a[name] - b[name]) for a, b in zip(one, two, strict=True)) for name in one[0]}
    return {
        "config": config or "toy", "overrides": overrides, "steps": len(one), "largest_difference": worst,
        "limit": LIMIT, "seconds": {"one process": seconds[0], "two ranks": seconds[1]},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {platform.system()}",
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a recipe; left out, the toy task")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    figures = measure(arguments.config, arguments.overrides)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "two_ranks.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return int(max(figures["largest_difference"].values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
