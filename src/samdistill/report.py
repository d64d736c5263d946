"""Write one self-contained HTML page per run: figures, tables, pictures, configuration and environment."""

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
    """Facts about the feature store of a run.

    Attributes:
        records: Number of records.
        codec: Name of the codec.
        bytes_per_record: Bytes of one record.
        fp16_bytes: Bytes of one record in the published layout, uncompressed in fp16.
        seconds: Time that writing took, or None.
        what: What is cached, for the heading.
        per: What one record belongs to, such as "image".
    """

    records: int
    codec: str
    bytes_per_record: int
    fp16_bytes: int
    seconds: float | None = None
    what: str = "embeddings"
    per: str = "image"


@dataclass(frozen=True)
class MergeGroup:
    """A group of checkpoint keys that a merge treated in the same way.

    Attributes:
        name: Name of the group, such as "kept", "replaced" or "removed".
        keys: Number of keys.
        parameters: Number of parameters.
    """

    name: str
    keys: int
    parameters: int


@dataclass(frozen=True)
class EarlierRun:
    """A run that had to be finished before.

    Attributes:
        job: Name of its job.
        figures: Lines with its main figures.
        report: Path of its page, relative to this one.
    """

    job: str
    figures: Sequence[str]
    report: str


@dataclass(frozen=True)
class ExportRow:
    """A file that was exported for a device.

    Attributes:
        path: Path of the file.
        bytes: Its size.
        result: Result of its comparison with the model.
    """

    path: str
    bytes: int
    result: str


@dataclass(frozen=True)
class ReportData:
    """Content of a report. Sections whose data are empty or None are omitted.

    Attributes:
        title: Title of the page.
        student: Name of the student's row in ``evaluation``.
        evaluation: Figures on held-out data.
        verdict: Sentence from ``evaluation.verdict``.
        start: Name of the row of the student before training.
        history: Records of the run's ``metrics.jsonl``.
        check: Results of ``samdistill check``.
        cache: The feature store.
        merge: Result of the merge by group of keys.
        merged: Path of the merged model.
        exported: Files for devices.
        earlier: Runs that this one needed.
        skipped: Unreadable inputs by stage. Those of ``evaluation`` are added.
        seconds: Wall-clock seconds by stage.
        config: The resolved configuration as YAML.
        machine: Result of ``describe_machine``.
        date: Date of the run.
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
    exported: Sequence[ExportRow] = ()
    earlier: Sequence[EarlierRun] = ()
    skipped: Mapping[str, Sequence[BadInput]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    config: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)
    date: str = ""


def write_report(path: Path, data: ReportData) -> Path:
    """Write the page. It is one file that loads nothing from elsewhere, and every string of ``data`` is escaped.

    Args:
        path: The HTML file. Its folder is created.
        data: Content of the page.

    Returns:
        ``path``.
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
    """Return the unreadable inputs of every stage that had some."""
    found = {**data.skipped, "evaluate": data.evaluation.skipped if data.evaluation is not None else ()}
    return {stage: bad for stage, bad in found.items() if bad}


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Describe the hardware and the versions of the packages.

    Args:
        device: Device of the run, such as ``cuda:0``.

    Returns:
        Values by name, in the order of the report.
    """
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
    """Describe the result in one or two sentences. Empty if the student was not measured."""
    found = data.evaluation
    return found.headline(data.student, data.start) if found and data.student in found.names else ""


def tiles(data: ReportData) -> list[Tile]:
    """Return the most important figures. Empty if the student was not measured."""
    found = data.evaluation
    return found.tiles(data.student, data.start) if found and data.student in found.names else []


def _processor() -> str:
    """Return the model name of the CPU, or its architecture if the name is not known."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def human_bytes(count: float) -> str:
    """Format a number of bytes: 1536 becomes "1.5 KiB"."""
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
