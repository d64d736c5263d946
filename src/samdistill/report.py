"""One self-contained HTML page per run: figures, tables, pictures, and everything needed to believe them."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, StrictUndefined

from .data.sources import BadInput
from .engine.check import TermReport
from .evaluation.result import DASH, EvaluationResult, ModelRow
from .report_figures import curves, data_uri

PACKAGES = ("samdistill", "torch", "torchvision", "transformers", "timm", "accelerate", "numpy")


@dataclass(frozen=True)
class CacheFacts:
    """The feature store of a run. fp16_bytes: what one record would take uncompressed (published layout)."""

    records: int
    codec: str
    bytes_per_record: int
    fp16_bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class MergeGroup:
    """What a merge did with some of the keys, such as "kept", "replaced" or "removed"."""

    name: str
    keys: int
    parameters: int


@dataclass(frozen=True)
class ReportData:
    """All that a page shows. Whatever is empty or None is left out of it.

    student, untrained: names of rows of ``evaluation``. history: lines of the run's ``metrics.jsonl``. merged: where
    the merged model was written. skipped: unreadable inputs by stage; those of ``evaluation`` are added. seconds:
    wall-clock time by stage. config: the resolved YAML. machine: from ``describe_machine``. date: of the run.
    """

    title: str
    student: str
    evaluation: EvaluationResult | None = None
    untrained: str | None = None
    history: Sequence[Mapping[str, Any]] = ()
    check: Sequence[TermReport] = ()
    cache: CacheFacts | None = None
    merge: Sequence[MergeGroup] = ()
    merged: str = ""
    skipped: Mapping[str, Sequence[BadInput]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    config: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)
    date: str = ""


class Tile(NamedTuple):
    """A figure worth a glance: what it is, its value, and what to compare it with."""

    label: str
    value: str
    note: str


def write_report(path: Path, data: ReportData) -> Path:
    """Write the page to ``path`` (one file, nothing is loaded from elsewhere) and return it.

    Every string of ``data`` is escaped. The folder is made where it is missing.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"data_uri": data_uri, "size": human_bytes, "duration": _duration, "count": "{:,}".format}
    template = environment.from_string((files("samdistill") / "report.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        d=data, headline=headline(data), tiles=tiles(data), curves=curves(data.history), dash=DASH,
        skipped=_skipped(data),
    )  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _skipped(data: ReportData) -> dict[str, Sequence[BadInput]]:
    """Unreadable inputs of every stage that had any."""
    found = {**data.skipped, "evaluate": data.evaluation.skipped if data.evaluation is not None else ()}
    return {stage: bad for stage, bad in found.items() if bad}


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Hardware and versions that a figure depends on."""
    facts = {"processor": _processor(), "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads used by PyTorch"}
    if device.startswith("cuda"):
        facts["accelerator"] = torch.cuda.get_device_name(device)
    elif device != "cpu":
        facts["accelerator"] = device
    facts |= {"system": platform.platform(terse=True), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue  # the package itself, run from its sources
    return facts


def headline(data: ReportData) -> str:
    """The result in one sentence; what was not measured is not mentioned."""
    student, teacher, untrained = _rows(data)
    if student is None or data.evaluation is None:
        return ""
    kind = next((k for k in data.evaluation.prompts if k in student.kept or k in student.agreement), None)
    asked = {"box": "with a box prompt", "point": "with one click", "refine": "with a corrected click"}.get(
        kind or "", ""
    )
    said = ""
    if kind is not None and kind in student.kept and teacher is not None:
        said = (
            f"The distilled student keeps {student.kept[kind]:.1%} of the teacher's mIoU {asked} "
            f"({student.miou[kind]:.3f} of {teacher.miou[kind]:.3f})"
        )
        if untrained is not None and kind in untrained.kept:
            said += f"; untrained, it keeps {untrained.kept[kind]:.1%}"
    elif kind is not None:
        said = (
            f"The distilled student's masks agree with the teacher's at an IoU of {student.agreement[kind]:.3f} {asked}"
        )
        if untrained is not None and kind in untrained.agreement:
            said += f"; untrained, at {untrained.agreement[kind]:.3f}"
    elif student.cosine is not None:
        said = f"The distilled student's features reach a cosine of {student.cosine:.3f} with the teacher's"
    return f"{said}. {_cost(student, teacher)}".strip() if said else _cost(student, teacher)


def _cost(student: ModelRow, teacher: ModelRow | None) -> str:
    if teacher is None:
        return ""
    parts = [_ratio("Its trunk is", teacher.trunk_parameters, student.trunk_parameters, "smaller", "larger")]
    if student.latency_ms and teacher.latency_ms:
        parts.append(_ratio("its vision encoder", teacher.latency_ms, student.latency_ms, "faster", "slower"))
    return " and ".join(parts) + "."


def _ratio(what: str, reference: float, value: float, less: str, more: str) -> str:
    if 0.95 < reference / value < 1.05:
        return f"{what} as {less.replace('smaller', 'large').replace('faster', 'fast')} as the teacher's"
    large, word = (reference / value, less) if reference > value else (value / reference, more)
    return f"{what} {large:.1f} times {word}"


def tiles(data: ReportData) -> list[Tile]:
    """At most five figures for the top of the page."""
    student, teacher, untrained = _rows(data)
    if student is None or data.evaluation is None:
        return []
    found = []
    for kind in data.evaluation.prompts:
        if kind in student.kept:
            before = untrained.kept.get(kind) if untrained is not None else None
            note = f"untrained {before:.1%}" if before is not None else f"mIoU {student.miou[kind]:.3f}"
            found.append(Tile(f"of the teacher's mIoU, {kind}", f"{student.kept[kind]:.1%}", note))
        elif kind in student.agreement:
            before = untrained.agreement.get(kind) if untrained is not None else None
            note = f"untrained {before:.3f}" if before is not None else ""
            found.append(Tile(f"IoU with the teacher, {kind}", f"{student.agreement[kind]:.3f}", note))
    note = f"teacher {teacher.trunk_parameters / 1e6:.2f} M" if teacher is not None else ""
    found.append(Tile("trunk parameters", f"{student.trunk_parameters / 1e6:.2f} M", note))
    if student.latency_ms is not None:
        note = f"teacher {teacher.latency_ms:.3g} ms" if teacher is not None and teacher.latency_ms else ""
        found.append(Tile("encoder latency", f"{student.latency_ms:.3g} ms", note))
    return found


def _rows(data: ReportData) -> tuple[ModelRow | None, ModelRow | None, ModelRow | None]:
    """Student, teacher, untrained student, as far as there are."""
    if data.evaluation is None:
        return None, None, None
    rows = {row.name: row for row in data.evaluation.rows}
    return rows.get(data.student), rows.get(data.evaluation.teacher or ""), rows.get(data.untrained or "")


def _processor() -> str:
    """The processor's own name where the system tells it."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes / 60:.1f} h"
