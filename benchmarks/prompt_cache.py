"""Prompt distillation with running teachers compared with the same from the cache: losses, speed, bytes.

    python benchmarks/prompt_cache.py --out benchmarks/results/prompt_cache.txt
    python benchmarks/prompt_cache.py --scenes 80 --compared 2 --repeats 1        # to try this script

The sandbox recipe with all four terms. Losses: before each of a few optimiser steps with running teachers, the same
student and batch are evaluated with features from the cache. Both are in float32, so the difference comes from the
cache's codec only. Speed: complete trainings that take turns; the figure is the median step of each without the first
steps. Bytes: size of one view of an image by feature. ``low_res_masks`` are the dense logits, which can be left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import Sheet, arguments, setting, use_device
from prompt_terms import RECIPE, recipe, render, taught
from training_speed import train

import samdistill
from samdistill.dist import default_device
from samdistill.jobs.prompt.config import PromptRunConfig
from samdistill.jobs.prompt.losses import DISTILLED_TERMS
from samdistill.jobs.prompt.parts import FEATURES, PromptParts
from samdistill.jobs.prompt.task import PromptTask
from samdistill.store import FeatureStore
from samdistill.types import Terms

ONLINE, CODECS = "running teachers", ("fp32", "fp16")
SKIPPED = 2
"""Steps of each training that are not counted, after its first: the allocator and the disk cache fill."""


def configs(args: argparse.Namespace, folder: Path) -> dict[str, PromptRunConfig]:
    """By contender; one epoch, so that all see the same views."""
    data = render(args.work.resolve() / f"scenes-{args.scenes}", args.scenes, 8)
    base = [
        setting("data.root", data), "data.kind=coco", "data.workers=0", "data.views=1", "train.epochs=1",
        "train.log_every=1", "train.precision=fp32", *taught(*DISTILLED_TERMS.weights), *args.overrides,
    ]  # fmt: skip
    found = {ONLINE: recipe([*base, setting("output", folder / "online")])}
    for codec in CODECS:
        own = folder / codec
        places = [setting("output", own), setting("distillation.precomputed_root", own / "features")]
        cached = ["distillation.use_precomputed_features=true", f"cache.codec={codec}", "cache.dense=true"]
        found[f"cache, {codec}"] = recipe([*base, *cached, *places])
    return found


def fill(config: PromptRunConfig) -> dict[str, Any]:
    """Cache all scenes; bytes of one view by teacher and feature, and seconds."""
    report, root = samdistill.cache(config, progress=False), PromptParts(config).split_root
    sizes: dict[str, int] = {}
    for teacher in (entry.name for entry in config.teachers):
        for feature in FEATURES:
            if (place := root / teacher / feature).is_dir():
                sizes[feature] = sizes.get(feature, 0) + FeatureStore(place).bytes_per_record
    return {"records": report.records, "seconds": report.seconds, "bytes": sizes}


def compare(tasks: Mapping[str, PromptTask], config: PromptRunConfig, steps: int) -> dict[str, Any]:
    """Largest relative difference of each term from the online one, by contender, over ``steps`` steps."""
    device = default_device()
    torch.manual_seed(config.train.seed)
    student = tasks[ONLINE].build_student().to(device).train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=config.train.lr)
    data, size = tasks[ONLINE].dataset(0), config.train.batch_size
    worst: dict[str, dict[str, float]] = {name: {} for name in tasks if name != ONLINE}
    values: dict[str, list[float]] = {}

    def ask(task: PromptTask, step: int) -> Terms:
        items = [data[index % len(data)] for index in range(step * size, (step + 1) * size)]  # type: ignore[arg-type]
        torch.manual_seed(step)  # whatever a student draws, it draws for everybody
        return task.terms(student, task.to(task.collate(items), device))

    for step in range(steps):
        with torch.no_grad():
            cached = {name: ask(tasks[name], step) for name in worst}
        terms = ask(tasks[ONLINE], step)
        for term, found in terms.items():
            value = found.value.item()
            values.setdefault(term, []).append(value)
            for name, others in cached.items():
                gap = abs(others[term].value.item() - value) / max(abs(value), 1e-12)
                worst[name][term] = max(worst[name].get(term, 0.0), gap)
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.train.clip_norm or float("inf"))
        optimiser.step()
        optimiser.zero_grad()
    return {"values": values, "largest relative difference": worst}


def speed(
    tasks: Mapping[str, PromptTask], config: PromptRunConfig, repeats: int, folder: Path
) -> dict[str, list[float]]:
    """Steps a second by the median step of each training; the contenders take turns."""
    rates: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(repeats):
        for name in tasks if turn % 2 else reversed(tasks):
            _, seconds = train(tasks[name], config, 0, folder)
            rates[name].append(1 / statistics.median(seconds[SKIPPED:]))
    return rates


def say_losses(sheet: Sheet, found: dict[str, Any], steps: int) -> None:
    worst = found["largest relative difference"]
    rows = [
        [term, f"{statistics.fmean(values):.4g}", *(f"{gaps[term]:.2g}" for gaps in worst.values())]
        for term, values in found["values"].items()
    ]
    sheet.table(
        f"losses with {ONLINE}, and the largest relative difference of the same from the cache, {steps} steps",
        ["", "mean value", *worst],
        rows,
    )


def say_bytes(sheet: Sheet, caches: dict[str, dict[str, Any]]) -> None:
    rows = [[feature, *(f"{cache['bytes'][feature]:,}" for cache in caches.values())] for feature in FEATURES]
    rows.append(["together", *(f"{sum(cache['bytes'].values()):,}" for cache in caches.values())])
    rows.append(["seconds to cache", *(f"{cache['seconds']:.1f}" for cache in caches.values())])
    count = next(iter(caches.values()))["records"]
    sheet.table(f"bytes of one view of an image; {count} are cached", ["", *caches], rows)


def say_speed(sheet: Sheet, rates: dict[str, list[float]], size: int) -> None:
    rows = []
    for name, own in rates.items():
        ratio = statistics.median([mine / theirs for mine, theirs in zip(own, rates[ONLINE], strict=True)])
        rows.append([name, f"{statistics.median(own):.3f}", f"{min(own):.3f}", f"{max(own):.3f}", f"{ratio:.2f}"])
    sheet.table(
        f"steps of {size} images a second by the median step, {len(rates[ONLINE])} trainings each, "
        f"{torch.get_num_threads()} thread(s)",
        ["", "median", "min", "max", f"of {ONLINE}"],
        rows,
    )


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "prompt_cache")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    parser.add_argument("--scenes", type=int, default=256, help="rendered scenes; a training is one epoch (256)")
    parser.add_argument("--compared", type=int, default=12, help="steps whose losses are compared (12)")
    parser.add_argument("--repeats", type=int, default=3, help="trainings of each (3)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = use_device(args.device)
    sheet = Sheet(device)
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        folder = Path(temporary)
        wanted = configs(args, folder)
        caches = {name: fill(config) for name, config in wanted.items() if name != ONLINE}
        tasks = {name: PromptParts(config).task() for name, config in wanted.items()}
        for task in tasks.values():
            task.held_out = None  # nothing is validated: steps are timed
        losses = compare(tasks, wanted[ONLINE], args.compared)
        rates = speed(tasks, wanted[ONLINE], args.repeats, folder)
    config = wanted[ONLINE]
    student = Path(config.student.start or "").name
    names = ", ".join(f"{entry.name} ({entry.checkpoint})" for entry in config.teachers)
    sheet.say()
    sheet.say(f"{RECIPE}: student {student!r}, teachers {names}; float32")
    say_losses(sheet, losses, args.compared)
    say_speed(sheet, rates, config.train.batch_size)
    say_bytes(sheet, caches)
    sheet.say()
    sheet.say("Steps with the cache read images, masks and records; running teachers answer in the training's process.")
    sheet.say("Not measured: full-size teachers, whose share of a step is larger, loader workers, accelerators.")
    sheet.save(args.out, {"losses": losses, "steps_per_second": rates, "caches": caches})


if __name__ == "__main__":
    main()
