"""One self-contained HTML page per run: figures, tables, pictures, and everything needed to believe them."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from .data.skipped import BadInput
from .engine.check import TermReport
from .evaluation.result import DASH, Evaluation
from .evaluation.result_story import Tile
from .io import make_folder, write_text
from .report_figures import curves, data_uri

PACKAGES = ("samdistill", "torch", "torchvision", "transformers", "timm", "accelerate", "numpy")


@dataclass(frozen=True)
class CacheFacts:
    """The feature store of a run. fp16_bytes: what one record would take uncompressed (published layout). what: is
    cached. per: what one record is of."""

    records: int
    codec: str
    bytes_per_record: int
    fp16_bytes: int
    seconds: float | None = None
    what: str = "embeddings"
    per: str = "image"


@dataclass(frozen=True)
class MergeGroup:
    """What a merge did with some of the keys, such as "kept", "replaced" or "removed"."""

    name: str
    keys: int
    parameters: int


@dataclass(frozen=True)
class ReportData:
    """All that a page shows. Whatever is empty or None is left out of it.

    student, start: names of rows of ``evaluation``. history: lines of the run's ``metrics.jsonl``. merged: where
    the merged model was written. skipped: unreadable inputs by stage; those of ``evaluation`` are added. seconds:
    wall-clock time by stage. config: the resolved YAML. machine: from ``describe_machine``. date: of the run.
    """

    title: str
    student: str
    evaluation: Evaluation[Any] | None = None
    verdict: str = ""
    start: str | None = None
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
    make_folder(path.parent)
    write_text(path, page)
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
    """The result in a sentence or two; empty where the student was not measured."""
    found = data.evaluation
    return found.headline(data.student, data.start) if found and data.student in found.names else ""


def tiles(data: ReportData) -> list[Tile]:
    """A few figures for the top of the page; none where the student was not measured."""
    found = data.evaluation
    return found.tiles(data.student, data.start) if found and data.student in found.names else []


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
