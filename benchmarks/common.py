"""Shared code of the benchmarks.

It writes the first line of a result (machine and versions), prints and stores results, and runs a study of the encoder
job (named settings x seeds, trained and evaluated with the commands of the package). Studies of the other jobs are in
``study.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import samdistill
from samdistill import load_config
from samdistill.checkpoints.promptable import load_model
from samdistill.checkpoints.report import sidecar
from samdistill.dist import default_device
from samdistill.engine import read_lines
from samdistill.evaluation import EvaluationResult, evaluate_models
from samdistill.jobs.encoder.config import EncoderRunConfig
from samdistill.jobs.encoder.parts import EncoderParts
from samdistill.report import describe_machine

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tools" / "sandbox"))  # the seeds and the score of the bundled teachers
TEACHER = "teacher"


def arguments(doc: str | None, work: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with the common options: ``--device``, ``--out`` and, with ``work``, ``--work``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--out", type=Path, help="write what is printed there, and the figures to a .json beside it")
    if work is not None:
        parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / work, help=f"(runs/{work})")
    return parser


def use_device(name: str) -> str:
    """Select the device of this process and its child processes. Raises ``SystemExit`` if it is not available.

    Commands use an accelerator if there is one, so the CPU is selected by hiding CUDA devices.
    """
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = default_device().type
    if name not in ("auto", found):
        raise SystemExit(f"--device {name}: this machine runs on {found}")
    return found


def machine_line(device: str) -> str:
    """Return hardware, threads, versions, load and date in one line."""
    facts = describe_machine(device)
    plain = ("processor", "accelerator", "system")
    told = ", ".join(value if key in plain else f"{key} {value}" for key, value in facts.items())
    return f"{told}; device {device}; load {os.getloadavg()[0]:.1f} at the start; {date.today().isoformat()}"


def setting(key: str, path: Path) -> str:
    """Return a ``key=value`` setting for a path with any characters."""
    return f"{key}={json.dumps(str(path))}"


class Sheet:
    """Prints the lines of a result. ``save`` writes them together with the figures."""

    def __init__(self, device: str) -> None:
        self.machine = {**describe_machine(device), "device": device, "load at the start": f"{os.getloadavg()[0]:.1f}"}
        self.lines: list[str] = []
        self.say(machine_line(device))
        self.command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        self.say(self.command)

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines.append(text)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table with a title. The first column is aligned left, the others right."""
        cells = [list(columns), *(list(row) for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        self.say()
        self.say(title)
        for row in cells:
            rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            self.say("  ".join(["", row[0].ljust(widths[0]), *rest]).rstrip())

    def save(self, out: Path | None, figures: Mapping[str, Any]) -> None:
        """Write the lines to ``out`` and the figures, with machine and date, to the ``.json`` beside it."""
        if out is None:
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(self.lines) + "\n")
        kept = {"command": self.command, "date": date.today().isoformat(), "machine": self.machine, "figures": figures}
        out.with_suffix(".json").write_text(json.dumps(kept, indent=1, default=str) + "\n")


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Format ``mean +- standard deviation`` (of the sample), or a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return format(mean, form)
    return f"{mean:{form}} +- {statistics.stdev(values):{form}}"


def note(text: str) -> None:
    """Print a line of progress with the time."""
    print(
        f"[{time.strftime('%H:%M:%S')}] {text}\n", end="", file=sys.stderr, flush=True
    )  # one write, as threads print too


def run_python(words: Sequence[str], log: Path, threads: int) -> None:
    """Run ``python WORDS`` in its own process. The output is appended to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("a") as file:
        done = subprocess.run([sys.executable, *words], env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise SystemExit(f"python {shlex.join(words)} ended with {done.returncode}; the end of {log}:\n{tail}")


def run_cli(words: Sequence[str], log: Path, threads: int) -> None:
    """Run ``samdistill WORDS`` in its own process. The output is appended to ``log``."""
    run_python(["-m", "samdistill", *words], log, threads)


def open_work(work: Path, mark: str, settings: Any) -> None:
    """Create a work folder, or reuse that of an interrupted call with the same settings.

    Raises ``SystemExit`` for a folder with other contents, as these are never removed.
    """
    kept, told = work / f"{mark}.json", json.dumps(settings)
    if kept.is_file() and kept.read_text() != told:
        raise SystemExit(f"{work}: left by a call with other settings; remove it, or give another --work")
    if not kept.is_file() and work.exists() and any(work.iterdir()):
        raise SystemExit(f"{work}: not empty, and not from this script; give another --work")
    (work / "stages").mkdir(parents=True, exist_ok=True)
    kept.write_text(told)


def run_stage(script: str, work: Path, stage: str, words: Sequence[str]) -> dict[str, Any]:
    """Run ``python SCRIPT WORDS --result FILE`` in its own process, unless an earlier call finished the stage.

    Returns the contents of the file with the time in seconds.
    """
    kept = work / "stages" / f"{stage.replace(' ', '_')}.json"
    if not kept.is_file():
        result, start = kept.with_suffix(".partial"), time.monotonic()
        note(stage)
        command = [sys.executable, script, *words, "--work", str(work), "--result", str(result)]
        if code := subprocess.run(command, stdout=sys.stderr).returncode:
            raise SystemExit(f"stage {stage!r} ended with {code}; {work} is kept, the same call goes on")
        row = {"stage": stage, "seconds": time.monotonic() - start, **json.loads(result.read_text())}
        kept.write_text(json.dumps(row))
        result.unlink()
    return json.loads(kept.read_text())


def train_once(recipe: str, settings: Sequence[str], log: Path, threads: int, last: str = "student") -> None:
    """Run ``samdistill train``, unless its run folder has ``last``, the last file that a training writes.

    An interrupted training is resumed. Raises ``SystemExit`` for a folder that was trained with other settings.
    """
    config = load_config(recipe, settings)
    run, kept = config.output, config.output / "config.yaml"
    if kept.is_file() and load_config(kept) != config:
        raise SystemExit(f"{run}: trained with other settings; remove it, or give another --work")
    if not (run / last).exists():
        note(f"training {run.name}")
        run_cli(["train", recipe, *settings], log, threads)


@dataclass(frozen=True)
class Study:
    """Variants (named sets of overrides) of one recipe, each trained with every seed and evaluated by seed.

    All variants of a seed have the same scenes, batches and steps. They are evaluated in one call, in which the latency
    of the models is measured in turns. All results are kept in ``work``, and finished ones are not repeated. ``base``
    has the overrides of all variants. ``jobs`` trainings run at a time with ``threads`` threads each.
    """

    work: Path
    variants: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    scenes: int
    val: int
    base: Sequence[str] = ()
    recipe: str = "encoder/sandbox"
    jobs: int = 1
    threads: int = 1
    results: dict[int, EvaluationResult] = field(default_factory=dict)

    @cached_property
    def data(self) -> Path:
        return self.work / f"scenes-{self.scenes}-{self.val}"

    def config(self, variant: str, seed: int) -> EncoderRunConfig:
        """Return the resolved settings of a training. Variants with the same codec share a store."""
        return load_config(self.recipe, self._settings(variant, seed))

    def _settings(self, variant: str, seed: int) -> list[str]:
        settings = [*self.base, *self.variants[variant]]
        codec = load_config(self.recipe, settings).cache.codec
        places = {
            "output": self.work / "trained" / f"{variant}-seed{seed}",
            "data.root": self.data, "cache.root": self.work / f"embeddings-{self.scenes}-{codec}",
        }  # fmt: skip
        return [*settings, *(setting(key, path) for key, path in places.items()), f"train.seed={seed}"]

    def run(self) -> None:
        """Render, cache, train and merge. It takes minutes per training."""
        samdistill.render_sandbox(self.data, train=self.scenes, val=self.val, progress=False)
        first = self.seeds[0]
        stores = {self.config(name, first).store_root: name for name in self.variants}
        for root, name in stores.items():
            note(f"caching {root.name}")
            words = ["cache", self.recipe, *self._settings(name, first)]
            run_cli(words, self.work / "logs" / f"{root.name}.txt", self.threads)
        pairs = [(name, seed) for seed in self.seeds for name in self.variants]
        with ThreadPoolExecutor(self.jobs) as pool:
            for _ in pool.map(lambda pair: self._train(*pair), pairs):
                pass

    def _train(self, variant: str, seed: int) -> None:
        config = self.config(variant, seed)
        run = config.output
        train_once(self.recipe, self._settings(variant, seed), self.work / "logs" / f"{run.name}.txt", self.threads)
        if not sidecar(run / "merged").is_file():
            samdistill.merge(run, config.teacher.path, run / "merged")

    def evaluate(self, device: str, repeats: int) -> None:
        """Evaluate the teacher and every variant of each seed on all held-out scenes, into ``results``."""
        for seed in self.seeds:
            config = self.config(next(iter(self.variants)), seed)
            parts = EncoderParts(config)
            models = {TEACHER: load_model(config.teacher.path, parts.teacher_info.image_size)}
            models |= {name: load_model(self.config(name, seed).output / "merged") for name in self.variants}
            note(f"evaluating seed {seed}")
            self.results[seed] = evaluate_models(
                models, parts.held_out_source(), parts.geometry, teacher=TEACHER, batch_size=config.evaluate.batch_size,
                device=device, pictures=0, repeats=repeats,
            )  # fmt: skip

    def values(self, variant: str, measure: str) -> list[float]:
        """Return a figure of a variant by seed. ``measure`` is a field of ``ModelRow``, or ``agreement.box`` etc."""
        name, _, kind = measure.partition(".")
        rows = [self.results[seed].row(variant) for seed in self.seeds]
        return [getattr(row, name)[kind] if kind else getattr(row, name) for row in rows]

    def differences(self, variant: str, baseline: str, measure: str) -> list[float]:
        """Return the difference of variant and baseline by seed."""
        pairs = zip(self.values(variant, measure), self.values(baseline, measure), strict=True)
        return [ours - theirs for ours, theirs in pairs]

    def steps(self, variant: str) -> set[int]:
        """Return the numbers of steps of a variant's trainings, according to their logs."""
        return {read_lines(self.config(variant, seed).output / "metrics.jsonl")[-1]["step"] for seed in self.seeds}

    def conditions(self) -> list[str]:
        """Return a text with the conditions that are equal for all variants."""
        config = self.config(next(iter(self.variants)), self.seeds[0])
        one = self.results[self.seeds[0]]
        steps = sorted(set().union(*(self.steps(name) for name in self.variants)))
        return [
            f"teacher {config.teacher.path!r}, student {config.student.backbone}, {self.scenes} scenes, "
            f"{'/'.join(map(str, steps))} steps of {config.train.batch_size}, seeds {', '.join(map(str, self.seeds))}; "
            f"{self.threads} thread(s) per training, {self.jobs} at a time",
            f"held out: {one.caption()}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings (without paths of this machine) and the evaluation of every seed."""
        places = {"output": True, "data": {"root"}, "cache": {"root"}}
        configs = {name: self.config(name, self.seeds[0]) for name in self.variants}
        return {
            "recipe": self.recipe, "scenes": self.scenes, "held_out": self.val, "seeds": list(self.seeds),
            "variants": {name: c.model_dump(mode="json", exclude=places) for name, c in configs.items()},
            "evaluations": {str(seed): result.to_dict() for seed, result in self.results.items()},
        }  # fmt: skip


MEASURES = {
    "feature cosine": ("cosine", ".4f"), "feature MSE": ("mse", ".4f"),
    "IoU with teacher, box": ("agreement.box", ".4f"), "IoU with teacher, point": ("agreement.point", ".4f"),
    "IoU with teacher, refine": ("agreement.refine", ".4f"),
    "share of teacher's mIoU, box": ("kept.box", ".4f"), "share of teacher's mIoU, point": ("kept.point", ".4f"),
    "share of teacher's mIoU, refine": ("kept.refine", ".4f"),
}  # fmt: skip
"""Rows of a study's table: title, figure, format."""


def study_arguments(doc: str | None, work: str) -> argparse.ArgumentParser:
    """Return a parser with the common options of all studies."""
    parser = arguments(doc, work)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all trainings, after the others")
    parser.add_argument("--backbone", default="es_ev_s", help="student (es_ev_s)")
    parser.add_argument("--scenes", type=int, default=1500, help="rendered scenes to train on (1500)")
    parser.add_argument("--val", type=int, default=96, help="held-out scenes (96)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--first-seed", type=int, default=0, help="to do some seeds now and others later (0)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each (1)")
    parser.add_argument("--repeats", type=int, default=25, help="timing rounds of the encoder latency (25)")
    return parser


def study(args: argparse.Namespace, variants: Mapping[str, Sequence[str]]) -> Study:
    """Build a study from the arguments of ``study_arguments``."""
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    base = [f"student.backbone={args.backbone}", f"train.epochs={args.epochs}", "data.workers=0", *args.overrides]
    return Study(args.work, variants, list(seeds), args.scenes, args.val, base, jobs=args.jobs)


def say_study(sheet: Sheet, found: Study, baseline: str) -> None:
    """Print the conditions, the table of all figures, and the difference of each variant to the baseline by seed."""
    sheet.say()
    for line in found.conditions():
        sheet.say(line)
    names = list(found.variants)
    rows = [[title, *(spread(found.values(n, m), f) for n in names)] for title, (m, f) in MEASURES.items()]
    sheet.table("mean +- standard deviation over seeds", ["", *names], rows)
    for name in names:
        if name == baseline:
            continue
        compared = []
        for title, (measure, form) in MEASURES.items():
            gaps = found.differences(name, baseline, measure)
            cells = (statistics.fmean(gaps), min(gaps), max(gaps))
            compared.append([title, *(f"{value:+{form}}" for value in cells)])
        sheet.table(f"{name} minus {baseline}, same seed", ["", "mean", "min", "max"], compared)
