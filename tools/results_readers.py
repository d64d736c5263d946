"""Types of claims, tables and benchmarks of the results page, and functions that read figures from a result file."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

Figures = Mapping[str, Any]
Values = Sequence[float]


@dataclass(frozen=True)
class Goal:
    """Goal of a figure. ``word`` is ``at least``, ``at most`` or ``below``."""

    word: str
    value: float

    def holds(self, figure: float) -> bool:
        if self.word == "at least":
            return figure >= self.value
        return figure <= self.value if self.word == "at most" else figure < self.value


@dataclass(frozen=True)
class Claim:
    """A row of the results page.

    Attributes:
        sentence: The claim.
        read: Function that returns the figure of every seed or repeat from a file's ``figures``.
        form: Format of a value.
        goal: The goal, or None.
        repeats: Whether the values are repeats of one measurement instead of seeds.
        headline: Sentence for the README's table. Empty for claims that are not in it.
    """

    sentence: str
    read: Callable[[Figures], Values]
    form: str = "{:.3f}"
    goal: Goal | None = None
    repeats: bool = False
    headline: str = ""


@dataclass(frozen=True)
class Table:
    """A table of variants and figures. ``read`` returns the values of every column by the name of the row."""

    title: str
    corner: str
    columns: Sequence[str]
    forms: Sequence[str]
    read: Callable[[Figures], Mapping[str, Sequence[Values]]]


@dataclass(frozen=True)
class Benchmark:
    """A result file. ``setup`` describes what was measured, without the results."""

    file: str
    title: str
    setup: str = ""
    claims: Sequence[Claim] = ()
    tables: Sequence[Table] = field(default=())


PROMPTS = {"box": "box", "point": "centre point", "refine": "point + 1 click", "refine2": "point + 2 clicks"}
GIB = 2**30


def named(evaluation: Figures, name: str) -> Figures:
    """Return the row of a model of an evaluation."""
    return next(model for model in evaluation["models"] if model["name"] == name)


def runs(name: str, *path: str) -> Callable[[Figures], Values]:
    """Return a reader of a figure of one model in every run of ``demo``."""

    def read(figures: Figures) -> Values:
        found = []
        for run in figures["runs"]:
            value = run["models"][name]
            for key in path:
                value = value[key]
            found.append(value)
        return found

    return read


def at(*path: str) -> Callable[[Figures], Values]:
    """Return a reader of the figure at a path of keys, or of the list of its repeats."""

    def read(figures: Figures) -> Values:
        value: Any = figures
        for key in path:
            value = value[key]
        return value if isinstance(value, list) else [value]

    return read


def by_seed(name: str, *path: str) -> Callable[[Figures], Values]:
    """Return a reader of a figure of one model in every seed of an encoder study."""
    return lambda figures: [
        named(evaluation, name)[path[0]] if len(path) == 1 else named(evaluation, name)[path[0]][path[1]]
        for evaluation in figures["evaluations"].values()
    ]


def latency_ratio(figures: Figures) -> Values:
    """Encoder time of the ``fused`` head over that of ``published``, by seed."""
    fused, published = (by_seed(name, "latency_ms")(figures) for name in ("fused", "published"))
    return [a / b for a, b in zip(fused, published, strict=True)]


def head_rows(figures: Figures) -> dict[str, list[Values]]:
    return {
        name: [*(by_seed(name, "agreement", kind)(figures) for kind in ("box", "point", "refine")),
               [by_seed(name, "trunk_parameters")(figures)[0] / 1e6]]
        for name in ("published", "fused")
    }  # fmt: skip


def codec_bytes(figures: Figures) -> dict[str, list[Values]]:
    sizes = figures["bytes"]["full_size"]
    return {name: [[size], [size / sizes["fp16"]]] for name, size in sizes.items()}


def codec_points(name: str, kind: str) -> Callable[[Figures], Values]:
    """Return a reader of the difference of agreement from fp16 with the same seed, in points of IoU."""
    return lambda figures: figures["against_fp16"][name][kind]["points"]


def store_rows(figures: Figures) -> dict[str, list[Values]]:
    columns = ("write MiB/s", "random read MiB/s, warm", "cold", "ms a record, warm")
    return {
        row["what"]: [[float(row[name].replace(",", ""))] if row[name] else [] for name in columns]
        for row in figures["rows"]
    }


def opening_seconds(figures: Figures) -> Values:
    (seconds,) = re.findall(r"worst of \d+: ([0-9.]+) s", figures["opening"])
    return [float(seconds)]


def loader_ratio(views: str) -> Callable[[Figures], Values]:
    """Return a reader of the median images per second, divided by those of the plain pipeline with uint8 output."""

    def read(figures: Figures) -> Values:
        found = figures["images_per_second"][views]
        return [statistics.median(found["samdistill"]) / statistics.median(found["plain, uint8"])]

    return read


def stage_rows(figures: Figures) -> dict[str, list[Values]]:
    stages = figures["stages"]
    rows = stages.items() if isinstance(stages, dict) else ((row["stage"], row) for row in stages)
    return {name: [[row["seconds"]], [row["peak_bytes"] / GIB]] for name, row in rows}


def part_rows(stage: str) -> Callable[[Figures], dict[str, list[Values]]]:
    return lambda figures: {name: [[p["seconds"]]] for name, p in figures["stages"][stage]["parts"].items()}


def study_rows(part: str, columns: Sequence[str]) -> Callable[[Figures], dict[str, list[Values]]]:
    """Return a reader of the figures of a study by variant: mIoU of prompts (``part`` is ``miou``) or other figures."""

    def read(figures: Figures) -> dict[str, list[Values]]:
        beside = {name: [found] for name, found in figures.get("beside", {}).items()}
        if isinstance(figures.get("teacher"), dict):
            beside["teacher"] = [figures["teacher"]]
        models = {
            name: [evaluation["models"][0] for evaluation in found]
            for name, found in (figures["evaluations"] | beside).items()
        }
        return {
            name: [[(model[part] if part else model)[column] for model in found] for column in columns]
            for name, found in models.items()
        }

    return read


def gained(with_teacher: str, alone: str, kind: str) -> Callable[[Figures], Values]:
    """Return a reader of the difference of mIoU between two variants of a study with the same seed."""

    def read(figures: Figures) -> Values:
        first, second = (
            [one["models"][0]["miou"][kind] for one in figures["evaluations"][name]] for name in (with_teacher, alone)
        )
        return [a - b for a, b in zip(first, second, strict=True)]

    return read


def cgf1_share(figures: Figures) -> Values:
    models = figures["evaluation"]
    return [named(models, "distilled")["cgf1"] / named(models, "teacher")["cgf1"]]


def sandbox_rows(figures: Figures) -> dict[str, list[Values]]:
    kinds = (*PROMPTS, "multimask")
    return {name: [[model["miou"][kind]] for kind in kinds] for name, model in figures["models"].items()}


def detector_rows(figures: Figures) -> dict[str, list[Values]]:
    rows = {f"world {name}": row for name, row in figures["by_world"].items()} | figures["by_kind"]
    columns = ("cgf1", "pmf1", "il_mcc", "ap")
    return {name: [[] if row[c] is None else [row[c]] for c in columns] for name, row in rows.items()}


def concept_rows(figures: Figures) -> dict[str, list[Values]]:
    columns = ("cgf1", "pmf1", "il_mcc", "mask_ap")
    return {
        name: [[named(figures["evaluation"], name)[column]] for column in columns] for name in ("teacher", "distilled")
    }


def steps_ratio(codec: str) -> Callable[[Figures], Values]:
    def read(figures: Figures) -> Values:
        steps = figures["steps_per_second"]
        return [statistics.median(steps[codec]) / statistics.median(steps["running teachers"])]

    return read


def loss_difference(codec: str) -> Callable[[Figures], Values]:
    return lambda figures: [max(figures["losses"]["largest relative difference"][codec].values())]


def clip_rows(memory: str) -> Callable[[Figures], dict[str, list[Values]]]:
    """Return a reader of J&F of single frames by group of questions, with one kind of memory.

    A group without questions has no value.
    """
    groups = ("all", "lookalikes", "unique", "occluded", "reappeared")

    def read(figures: Figures) -> dict[str, list[Values]]:
        return {
            name: [
                [one[group]["jf"] for one in (run["models"][0][memory] for run in found) if one[group]["count"]]
                for group in groups
            ]
            for name, found in figures["evaluations"].items()
        }

    return read


def memory_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return rows for all three kinds of memory. Without memory, all variants have the same values."""
    none = {"without memory": next(iter(clip_rows("none")(figures).values()))}
    kinds = {"the student's features": "own", "the teacher's features": "teacher"}
    return none | {
        f"{name}, {kind}": row for kind, memory in kinds.items() for name, row in clip_rows(memory)(figures).items()
    }


def clip_gain(figures: Figures) -> Values:
    """Return the gain of the student's own memory, divided by the gain of the teacher's features."""
    found = [one["models"][0] for one in figures["evaluations"]["memory"]]
    none, own, teacher = ([one[kind]["all"]["jf"] for one in found] for kind in ("none", "own", "teacher"))
    return [(b - a) / (c - a) for a, b, c in zip(none, own, teacher, strict=True)]


def followed_gain(figures: Figures) -> Values:
    found = figures["results"]["memory"]
    none, own, teacher = (
        [named(one, name)["jf"] for one in found] for name in ("without memory", "student", "teacher memory")
    )
    return [(b - a) / (c - a) for a, b, c in zip(none, own, teacher, strict=True)]


def followed_rows(figures: Figures) -> dict[str, list[Values]]:
    return {
        name: [[named(one, name)[column] for one in figures["results"]["memory"]]
               for column in ("jf", "j", "f", "reappeared", "occluded")]
        for name in ("without memory", "student", "teacher memory")
    }  # fmt: skip


def last_against_second(column: str) -> Callable[[Figures], Values]:
    """Return a reader of a value of the last hundred frames of a stream, divided by that of the second hundred."""
    return lambda figures: [figures["rows"]["with memory"][-1][column] / figures["rows"]["with memory"][1][column]]


def worst_relative(pairs: Figures, beyond: str = "\0") -> float:
    """Return the largest difference relative to the largest value of its stage.

    Stages whose name begins with ``beyond`` do not count.
    """
    return max(difference / size for name, (difference, size) in pairs.items() if not name.startswith(beyond))


def sam3_difference(depth: str) -> Callable[[Figures], Values]:
    return lambda figures: [worst_relative(found, BEYOND) for found in figures["differences"].get(depth, {}).values()]


def transformers_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return the relative differences of stages in which transformers itself differs, of every model by depth."""
    depths = [list(figures["differences"].get(depth, {}).values()) for depth in ("reduced", "full")]
    names = dict.fromkeys(name for found in depths for pairs in found for name in pairs if name.startswith(BEYOND))
    return {
        name.removeprefix(BEYOND): [[p[name][0] / p[name][1] for p in found if name in p] for found in depths]
        for name in names
    }


def uncovered(name: str) -> Callable[[Figures], Values]:
    """Return a reader of the number of tensors that a published ``sam3.pt`` does not fill. Only for full depth."""
    return lambda figures: [figures["coverage"][name]["missing or of another shape"]] if "coverage" in figures else []


def official_difference(*names: str) -> Callable[[Figures], Values]:
    return lambda figures: [max(chain(*(figures[name]["largest difference"].values() for name in names)))]


def over_kills(count: Callable[[Figures], float]) -> Callable[[Figures], Values]:
    """Return a reader of a sum over all kinds of killed work. It is empty if nothing was killed."""
    return lambda figures: [sum(map(count, figures["kills"].values()))] if "kills" in figures else []


def mutations(figures: Figures) -> Values:
    """Return the number of damaged inputs. Empty if none was tried."""
    return [sum(figures["mutations"]["total"].values())] if "mutations" in figures else []


def mutation_faults(figures: Figures) -> Values:
    return [len(figures["mutations"]["faults"])] if "mutations" in figures else []


BEYOND = "transformers alone: "
"""Prefix of stages of ``sam3_equality.py`` in which transformers itself differs from the original code."""
