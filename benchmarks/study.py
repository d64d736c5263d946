"""Studies of trainings: named sets of overrides of one recipe x seeds, each trained and then measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import Sheet, note, setting, spread, train_once

from samdistill.config import Run
from samdistill.engine import read_lines
from samdistill.jobs.loading import load_config

Measures = Mapping[str, str]
"""Columns of a table: title, and path of the figure in the row of a measured model, such as ``miou.box``."""


@dataclass(frozen=True)
class Trainings:
    """A study that runs each training and measurement in its own process. Finished ones in ``work`` are not repeated.

    - ``variants``: overrides by name. ``{seed}`` is replaced by the seed.
    - ``base``: overrides of all variants, applied before those.
    - ``measure``: writes the figures of a model (a run or a model's path) to a JSON file, with the model's own row
      first under ``models``.
    - ``beside``: other models by name, measured once.
    - ``jobs``: number of processes at a time, with one thread each.
    - ``last``: last file that a training writes to its folder.
    """

    recipe: str
    work: Path
    variants: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    measure: Callable[[str, Path], None]
    base: Sequence[str] = ()
    beside: Mapping[str, str] = field(default_factory=dict)
    jobs: int = 1
    last: str = "student"

    def folder(self, variant: str, seed: int) -> Path:
        return self.work / "trained" / f"{_plain(variant)}-seed{seed}"

    def settings(self, variant: str, seed: int) -> list[str]:
        own = [text.replace("{seed}", str(seed)) for text in (*self.base, *self.variants[variant])]
        return [*own, setting("output", self.folder(variant, seed)), f"train.seed={seed}", f"data.seed={seed}"]

    def config(self, variant: str, seed: int) -> Run:
        return load_config(self.recipe, self.settings(variant, seed))

    def run(self) -> None:
        """Train and measure one seed after another, so that an interrupted study has complete seeds."""
        for name, model in self.beside.items():
            self._measure(model, self._kept(_plain(name)))
        pairs = [(name, seed) for seed in self.seeds for name in self.variants]
        with ThreadPoolExecutor(self.jobs) as pool:
            for _ in pool.map(lambda pair: self._one(*pair), pairs):
                pass

    def _one(self, variant: str, seed: int) -> None:
        run = self.folder(variant, seed)
        train_once(self.recipe, self.settings(variant, seed), self.log(run.name), 1, self.last)
        self._measure(str(run), self._kept(run.name))

    def _measure(self, model: str, kept: Path) -> None:
        if not kept.is_file():
            note(f"measuring {kept.stem}")
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(".partial")
            self.measure(model, partial)
            partial.replace(kept)

    def _kept(self, name: str) -> Path:
        return self.work / "evaluated" / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.work / "logs" / f"{name}.txt"

    def result(self, name: str, seed: int | None = None) -> dict[str, Any]:
        """Return all figures of a variant's training or, without ``seed``, of one of the other models."""
        kept = self._kept(_plain(name) if seed is None else self.folder(name, seed).name)
        return json.loads(kept.read_text())

    def values(self, name: str, measure: str) -> list[float]:
        """Return a figure of a variant by seed, or of one of the other models."""
        seeds: Sequence[int | None] = [None] if name in self.beside else self.seeds
        found = []
        for seed in seeds:
            value = self.result(name, seed)["models"][0]
            for key in measure.split("."):
                value = value[key]
            found.append(value)
        return found

    def differences(self, variant: str, baseline: str, measure: str) -> list[float]:
        """Return the difference of variant and baseline by seed. The baseline may be one of the other models."""
        theirs = self.values(baseline, measure)
        pairs = zip(self.values(variant, measure), theirs * (1 if len(theirs) > 1 else len(self.seeds)), strict=True)
        return [ours - other for ours, other in pairs]

    def trained(self, variant: str) -> tuple[int, list[float]]:
        """Return the number of steps, and their seconds by seed."""
        lines = [read_lines(self.folder(variant, seed) / "metrics.jsonl") for seed in self.seeds]
        last = [[line for line in run if "seconds" in line][-1] for run in lines]  # not the validation after it
        return last[0]["step"], [line["seconds"] for line in last]

    def to_dict(self) -> dict[str, Any]:
        """Return settings and all figures, without paths of this machine."""
        found = {
            "recipe": self.recipe, "seeds": list(self.seeds), "base": list(self.base), "variants": dict(self.variants),
            "beside": {name: self.result(name) for name in self.beside},
            "evaluations": {name: [self.result(name, seed) for seed in self.seeds] for name in self.variants},
            "training": {n: dict(zip(("steps", "seconds"), self.trained(n), strict=True)) for n in self.variants},
        }  # fmt: skip
        return json.loads(json.dumps(found).replace(str(self.work), "work"))


def _plain(name: str) -> str:
    """Convert a name to a valid folder name."""
    return name.replace(": ", "_").replace(" ", "_").replace("/", "-")


def say_figures(sheet: Sheet, found: Trainings, measures: Measures, form: str = ".4f") -> None:
    """Print all figures of all variants and of the other models."""
    rows = []
    for name in found.variants:
        steps, seconds = found.trained(name)
        figures = [spread(found.values(name, measure), form) for measure in measures.values()]
        rows.append([name, *figures, str(steps), spread(seconds, ".0f")])
    for name in found.beside:
        rows.append([name, *(f"{found.values(name, measure)[0]:{form}}" for measure in measures.values()), "", ""])
    sheet.table("mean +- standard deviation over seeds", ["", *measures, "steps", "seconds in steps"], rows)


def say_differences(
    sheet: Sheet, found: Trainings, measures: Measures, compared: Sequence[tuple[str, str]], form: str = ".4f"
) -> None:
    """Print, for each figure, the difference of the first and second variant of each pair by seed."""
    for title, measure in measures.items():
        rows = []
        for name, baseline in compared:
            gaps = found.differences(name, baseline, measure)
            cells = [statistics.fmean(gaps), *gaps]
            rows.append([f"{name} minus {baseline}", *(f"{value:+{form}}" for value in cells)])
        if rows:
            sheet.table(f"{title}, same seed", ["", "mean", *(f"seed {seed}" for seed in found.seeds)], rows)
