"""``export.json``, the table in the terminal and the model card of an exported folder."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..io import copy_file, remove, write_json, write_text
from ..report import ExportRow
from .gate import Verdict
from .parts import Part
from .targets import Contents

RECORD = "export.json"
FORMAT = 1
"""Version of ``export.json``. It grows with every change that an older reader would misread."""
_KINDS = {"promptable": "promptable model"}
_PACKAGES = (
    "samdistill", "torch", "transformers", "timm", "onnx", "onnxscript", "onnxruntime", "openvino", "executorch",
    "coremltools", "litert-torch",
)  # fmt: skip


@dataclass
class File:
    """One exported file.

    Attributes:
        path: Path in the folder.
        part: Name of the part.
        target: Name of the target.
        precision: ``fp32``, ``fp16`` or ``int8``.
        bytes: Size.
        sha256: Checksum in hexadecimal.
        verdict: Result of the gate.
        contents: What the file says about itself.
        ports: Inputs and outputs of the part.
    """

    path: str
    part: Part
    target: str
    precision: str
    bytes: int
    sha256: str
    verdict: Verdict
    contents: Contents

    def refuse(self, folder: Path, problem: str) -> None:
        """Add a problem that was found after delivery, and say it in the file's name."""
        self.verdict.problems.append(problem)
        old = folder / self.path
        if not old.stem.endswith(".failed"):
            new = old.with_name(f"{old.stem}.failed{old.suffix}")
            copy_file(old, new)
            remove(old)
            self.path = new.relative_to(folder).as_posix()

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of ``export.json``."""
        rows = {
            kind: [
                {"name": port.name, "dtype": str(port.dtype).removeprefix("torch."), "shape": list(port.shape)}
                for port in ports
            ]
            for kind, ports in (("inputs", self.part.inputs), ("outputs", self.part.outputs))
        }
        for row in rows["inputs"]:
            row["shape"] = list(self.contents.inputs.get(row["name"], ()))
        return {
            "path": self.path, "part": self.part.name, "target": self.target, "precision": self.precision,
            "bytes": self.bytes, "sha256": self.sha256, "passed": self.verdict.passed, **rows,
            "opset": self.contents.opset, "operators": self.contents.operators, "gate": self.verdict.to_dict(),
        }  # fmt: skip


@dataclass
class Exported:
    """Result of an export.

    Attributes:
        folder: The folder.
        kind: Kind of the model.
        name: Name of the model, for people.
        source: Where it was loaded from.
        about: Further entries of ``export.json``: configuration, canvas, vocabulary, quality.
        files: The files.
        others: Checksums of the files beside them.
    """

    folder: Path
    kind: str
    name: str
    source: str
    about: dict[str, Any]
    files: list[File] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every file passed the gate."""
        return all(file.verdict.passed for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``export.json``."""
        return {
            "format": FORMAT, "name": self.name, "kind": self.kind, "source": self.source,
            "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **self.about,
            "versions": versions(), "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
            "files": [file.to_dict() for file in self.files], "others": self.others,
        }  # fmt: skip

    def table(self) -> Table:
        """Return the table for the terminal."""
        table = Table("file", "size", "difference", "agreement", "operators", "ms", "eager ms", "gate")
        for file in self.files:
            found, spent = file.verdict, file.verdict.milliseconds
            table.add_row(
                file.path, _size(file.bytes), f"{found.difference:.1e}" if found.ran else "-",
                f"{found.agreement:.4f}" if found.ran else "-", str(len(file.contents.operators)),
                *(f"{spent[name]:.1f}" if name in spent else "-" for name in ("file", "eager")),
                _gate(found),
            )  # fmt: skip
        return table

    def rows(self) -> list[ExportRow]:
        """Return the files as rows of a run's report."""
        return [ExportRow(f"{self.folder.name}/{file.path}", file.bytes, _gate(file.verdict)) for file in self.files]

    def summary(self) -> str:
        """Return the folder and its size as a line, and what reduced files lose on held-out data."""
        size = _size(sum(file.bytes for file in self.files))
        lines = [f"{self.folder}: {len(self.files)} files ({self.kind}), {size}"]
        for precision, found in self.about.get("quality", {}).items():
            if found["measured"]:
                figures = [f"{name} {one['model']:.3f} -> {one['file']:.3f}" for name, one in found["figures"].items()]
                figures += [
                    f"IoU with the model, {kind} {value:.3f}" for kind, value in found.get("agreement", {}).items()
                ]
                lines.append(f"{precision} on held-out data: {', '.join(figures)}")
        return "\n".join(lines)


def _gate(found: Verdict) -> str:
    if not found.passed:
        return "failed: " + "; ".join(found.problems)
    return "passed" if found.ran else "structure checked; not run here"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed here."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_record(folder: Path, exported: Exported) -> None:
    """Write ``export.json``. Everything else of the folder is there already."""
    write_json(folder / RECORD, exported.to_dict(), indent=1)


def write_card(folder: Path, exported: Exported) -> None:
    """Write ``README.md``, the model card."""
    write_text(folder / "README.md", "\n".join(_card(exported)) + "\n")


def _card(exported: Exported) -> list[str]:
    about = exported.about
    side, count = about["canvas"]["image_size"], about["parameters"]
    kind = _KINDS.get(exported.kind, exported.kind)
    lines = [
        "---", "library_name: samdistill", "pipeline_tag: mask-generation", "tags: [onnx, segment-anything]", "---", "",
        f"# {exported.name}", "",
        f"A {kind} ({about['architecture']}, {count / 1e6:.2f}M parameters, {side} x {side} px), exported by "
        f"samdistill {versions().get('samdistill', '')} from `{exported.source}`.", "",
        "| file | precision | size | difference from eager | agreement of masks | gate |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for file in exported.files:
        found = file.verdict
        figures = (f"{found.difference:.1e}", f"{found.agreement:.4f}") if found.ran else ("not run", "not run")
        lines.append(
            f"| `{file.path}` | {file.precision} | {_size(file.bytes)} | {figures[0]} | {figures[1]} | {_gate(found)} |"
        )
    if words := about.get("vocabulary"):
        lines += ["", f"Concepts: {', '.join(words['phrases'])}. Others need another export."]
    lines += ["", "## Use", "", *_use(exported), "", "## Origin", "", *_origin(exported), ""]
    lines += [
        "## Licence", "",
        "The code that made these files is under Apache-2.0. The weights are distilled or copied from other models, "
        "whose licences hold for them: SAM and MobileSAM Apache-2.0, SAM 3 the SAM License of Meta, timm backbones the "
        "licence on their model cards.",
    ]  # fmt: skip
    return lines


def _use(exported: Exported) -> list[str]:
    prompt = "--point 60,60" if exported.kind == "promptable" else '--text "red circle"'
    return [
        "`predict.py` needs NumPy, Pillow and onnxruntime alone:", "", "```bash",
        f"python predict.py photo.jpg {prompt} --out seen.png", "```", "",
        "`samdistill predict` and `samdistill evaluate` open this folder like any model. `export.json` has inputs, "
        "outputs and axes of every file, and SHA-256 of all.",
    ]  # fmt: skip


def _origin(exported: Exported) -> list[str]:
    run = exported.about.get("run")
    if not run:
        return [f"Loaded from `{exported.source}`. No run folder with figures stands there."]
    lines = [f"Run of the {run['job']} job with the teacher(s) {', '.join(run['teachers']) or 'unknown'}."]
    rows = (run.get("evaluation") or {}).get("models", ())
    for row in rows:
        figures = [f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)]
        lines.append(f"- held out, {row.get('name', 'model')}: {', '.join(figures)}")
    return lines
