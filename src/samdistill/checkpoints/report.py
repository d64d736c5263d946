"""Report of a merge: its tensors one by one and in total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from ..reading import Table as Settings
from ..reading import read_json
from ..students import StudentTrunkConfig
from ..types import UserError
from .files import TensorInfo
from .loading import build_config

REPORT = "merge.json"
Table = dict[str, TensorInfo]
_WRAPPERS = ("detector", "detector_model", "tracker", "tracker_model")


@dataclass(frozen=True)
class MergeReport:
    """Tensors that a merge kept, removed and added.

    Attributes:
        source: Where the student came from.
        into: The teacher.
        out: The result.
        layout: Layout of teacher and result.
        kept: Tensors of the teacher that are unchanged, bit for bit. Name in the file to shape and dtype.
        removed: Tensors of the teacher's trunk or text encoder.
        added: Tensors of the student.
        student: The student's configuration.
        notes: Other changes, one sentence each.
    """

    source: str
    into: str
    out: str
    layout: Literal["transformers", "sam3.pt"]
    kept: Table
    removed: Table
    added: Table
    student: dict[str, Any] = field(repr=False)
    """A ``sam3.pt`` cannot hold a configuration, and the student cannot be loaded without one."""
    notes: tuple[str, ...] = ()

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Number of tensors, elements (parameters and buffers) and bytes that were kept, removed and added."""
        return {name: total(table) for name, table in self._tables().items()}

    def _tables(self) -> dict[str, Table]:
        return {"kept": self.kept, "removed": self.removed, "added": self.added}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-serialisable dictionary: totals, and shape, dtype and bytes of each tensor."""
        tables = {
            name: {k: {"shape": list(v.shape), "dtype": dtype_name(v), "bytes": v.bytes} for k, v in table.items()}
            for name, table in self._tables().items()
        }
        return {
            "source": self.source, "into": self.into, "out": self.out, "layout": self.layout, "totals": self.totals,
            "notes": list(self.notes), "student": self.student, **tables,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"merged {self.source} into {self.into}: {self.out} ({self.layout} layout)"]
        for name, table in self._tables().items():
            sums = total(table)
            lines.append(
                f"{name:8} {sums['tensors']:5} tensors {sums['elements'] / 1e6:9.3f} M {sums['bytes'] / 1e6:9.1f} MB"
            )
            lines += [
                f"  {group}: {s['tensors']} tensors, {s['elements'] / 1e6:.3f} M, {s['bytes'] / 1e6:.1f} MB"
                for group, s in grouped(table).items()
            ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def sidecar(path: Path) -> Path:
    """Return the path of a merge's report: inside a folder, beside a file."""
    return path / REPORT if path.is_dir() else path.with_name(f"{path.name}.{REPORT}")


class _Kept(BaseModel):
    """The part of a merge's report that is read back."""

    student: Settings


def merged_student(path: Path) -> StudentTrunkConfig:
    """Return the student's configuration that the merge recorded for ``path``.

    Raises:
        UserError: The report is missing or is not that of a merge.
    """
    if not sidecar(path).is_file():
        raise UserError(f"{sidecar(path)}: missing; without it the student inside {path} cannot be built")
    kept = read_json(sidecar(path), _Kept, "not the report of a merge")
    return build_config(StudentTrunkConfig, kept.student, sidecar(path))


def total(table: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Return the number of tensors, elements and bytes."""
    return {
        "tensors": len(table),
        "elements": sum(v.count for v in table.values()),
        "bytes": sum(v.bytes for v in table.values()),
    }


def grouped(table: Mapping[str, TensorInfo], depth: int | None = None) -> dict[str, dict[str, int]]:
    """Return the totals per module.

    Args:
        table: Tensors by name.
        depth: A module is the first ``depth`` parts of a name, without its last part. None selects a depth by the name
            that separates encoders from necks and keeps each head as a whole.
    """
    groups: dict[str, Table] = {}
    for name, about in table.items():
        parts = name.split(".")
        wanted = _telling_depth(parts) if depth is None else depth
        groups.setdefault(".".join(parts[: min(wanted, max(len(parts) - 1, 1))]), {})[name] = about
    return {group: total(members) for group, members in groups.items()}


def _telling_depth(parts: list[str]) -> int:
    wrapped = next((i for i, part in enumerate(parts) if part not in _WRAPPERS), 0)
    if parts[wrapped] == "backbone":
        return wrapped + 3 if parts[wrapped + 1 : wrapped + 2] == ["vision_backbone"] else wrapped + 2
    return wrapped + (2 if parts[wrapped] == "vision_encoder" else 1)


def dtype_name(about: TensorInfo) -> str:
    """Return the name of a dtype without its module: ``float32``, not ``torch.float32``."""
    return str(about.dtype).removeprefix("torch.")
