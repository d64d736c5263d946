"""Training steps per second with the cache compared with tensors in memory. The goal is a ratio of 0.9.

    python benchmarks/training_speed.py --out benchmarks/results/training_speed.txt

Both run ``engine.fit`` on the same task, batches and seed. With the cache, loader workers decode and augment the JPEG
and read the record. In memory, the same items were prepared before, and only collation remains. The two take turns, the
order is reversed in every other repeat, and their losses must be equal bit for bit. A figure covers a whole training
without saving, including the start of the workers. A training is one epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import Sheet, arguments, setting, use_device
from torch.utils.data import Dataset

import samdistill
from samdistill import load_config
from samdistill.config import Run
from samdistill.data import collate_images
from samdistill.engine import FitResult, fit, read_lines
from samdistill.engine.task import Phase, Task
from samdistill.jobs.encoder.config import EncoderRunConfig
from samdistill.jobs.encoder.parts import EncoderParts
from samdistill.jobs.encoder.task import EncoderBatch, EncoderTask, ViewItem
from samdistill.teachers import Maps

MEMORY, GOAL = "in memory", 0.9


class _Held(Dataset):
    def __init__(self, items: Sequence[tuple[ViewItem, Maps]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[ViewItem, Maps]:
        return self.items[index]


class InMemory(EncoderTask):
    """The task with every item of its one view decoded, augmented and read beforehand."""

    def hold(self) -> InMemory:
        images = super().dataset(0)
        items = [images[index] for index in range(len(images))]  # type: ignore[arg-type]
        self._items = _Held([(item, super(InMemory, self).collate([item]).teacher_features) for item in items])
        return self

    def dataset(self, epoch: int) -> Dataset:  # type: ignore[override]
        return self._items

    def collate(self, items: Sequence[tuple[ViewItem, Maps]], phase: Phase = Phase()) -> EncoderBatch:  # type: ignore[override]
        images, _ = collate_images([image for (image, _), _ in items])
        assert images is not None
        return EncoderBatch(images, tuple(map(torch.cat, zip(*(told for _, told in items), strict=True))))


def train(task: Task[Any], config: Run, workers: int, folder: Path) -> tuple[FitResult, list[float]]:
    """One training, silent; the seconds of each step after the first."""
    with tempfile.TemporaryDirectory(dir=folder) as run, contextlib.redirect_stderr(io.StringIO()):
        result = fit(task, config.train, Path(run) / "run", workers=workers)
        seconds = [line["seconds"] for line in read_lines(Path(run) / "run" / "metrics.jsonl")]
    return result, [after - before for before, after in pairwise(seconds)]


def measure(
    tasks: dict[str, tuple[EncoderTask, int]], config: EncoderRunConfig, repeats: int, folder: Path
) -> dict[str, list[tuple[float, float]]]:
    """Per contender and repeat: steps a second over the whole training, and by its median step."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    terms: dict[str, float] | None = None
    for turn in range(repeats + 1):
        for name in tasks if turn % 2 else reversed(tasks):
            task, workers = tasks[name]
            result, steps = train(task, config, workers, folder)
            if terms is not None and result.terms != terms:
                raise SystemExit(f"{name}: ended at {result.terms}, not at {terms}: these are not the same steps")
            terms = result.terms
            if turn:  # the first round fills the disk cache and the allocator
                found[name].append((result.steps / result.seconds, 1 / statistics.median(steps)))
    return found


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "training_speed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe, after the others")
    parser.add_argument("--recipe", default="encoder/sandbox")
    parser.add_argument("--student", default="es_ev_s", help="a bigger one waits less for its data")
    parser.add_argument("--image-size", type=int, default=126, help="side of the input in pixels (126)")
    parser.add_argument("--scenes", type=int, default=768, help="rendered scenes, all held in memory (768)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (5); one more warms up")
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> EncoderRunConfig:
    """Scenes rendered and cached, as far as they are not yet there."""
    data, store = args.work / f"scenes-{args.scenes}", args.work / f"embeddings-{args.scenes}-{args.image_size}"
    samdistill.render_sandbox(data, train=args.scenes, val=2, progress=False)
    config = load_config(args.recipe, [
        setting("output", args.work / "run"), setting("data.root", data), setting("cache.root", store),
        f"student.backbone={args.student}", f"teacher.image_size={args.image_size}", "train.epochs=1",
        "train.warmup_epochs=0.1", "data.workers=0", f"train.batch_size={args.batch}", "train.log_every=1",
        *args.overrides,
    ])  # fmt: skip
    samdistill.cache(config, progress=False)
    return config


def main() -> None:
    args = parse()
    device = use_device(args.device)
    sheet = Sheet(device)
    config = prepare(args)
    parts = EncoderParts(config)
    task = parts.task(parts.signals(proven=False))
    held = InMemory(config, task.teacher, task.signals, task.images).hold()
    tasks: dict[str, tuple[EncoderTask, int]] = {MEMORY: (held, 0)}
    tasks |= {f"cache, {workers} worker(s)": (task, workers) for workers in args.workers}
    logging.getLogger("samdistill.run.0").setLevel(logging.WARNING)
    found = measure(tasks, config, args.repeats, args.work)
    rows, figures = [], {}
    for name, rates in found.items():
        whole, middle = [rate for rate, _ in rates], [rate for _, rate in rates]
        ratios = [ours / theirs for ours, (theirs, _) in zip(whole, found[MEMORY], strict=True)]
        ratio = statistics.median(ratios)
        figures[name] = {"steps_per_second": whole, "by_median_step": middle, "of_memory": ratios}
        rows.append([
            name, f"{statistics.median(whole):.3f}", f"{min(whole):.3f}", f"{max(whole):.3f}",
            f"{statistics.median(middle):.3f}", f"{ratio:.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}",
        ])  # fmt: skip
    columns = ["", "steps/s, median", "min", "max", "by median step", "of memory", "min", "max"]
    sheet.table(
        f"{config.student.backbone} at {args.image_size} px, {args.scenes // args.batch} steps of {args.batch} per "
        f"training, {args.repeats} repeats, {torch.get_num_threads()} thread(s) in the training process, codec "
        f"{config.cache.codec}; losses equal to the bit",
        columns,
        rows,
    )
    best = max((n for n in figures if n != MEMORY), key=lambda n: statistics.median(figures[n]["of_memory"]))
    reached = statistics.median(figures[best]["of_memory"])
    sheet.say(f"best: {best}, {reached:.3f} of memory; goal {GOAL}: {'reached' if reached >= GOAL else 'missed'}")
    sheet.say("Not measured: full-size records (10.6 MB) from a disk that is not cached, accelerators, several ranks.")
    sheet.save(args.out, {"config": {"student": args.student, "image_size": args.image_size, "batch": args.batch,
                                     "scenes": args.scenes}, "contenders": figures})  # fmt: skip


if __name__ == "__main__":
    main()
