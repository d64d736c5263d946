"""What a merge did, tensor by tensor and in total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .files import TensorInfo

Table = dict[str, TensorInfo]
_WRAPPERS = ("detector", "detector_model", "tracker", "tracker_model")


@dataclass(frozen=True)
class MergeReport:
    """kept: the teacher's tensors, bit for bit as they were. removed: the teacher's trunk. added: the student's trunk.

    Each maps a name in the file to its shape and dtype (``.bytes``, ``.count``). ``notes`` tells what else changed.
    """

    source: str
    into: str
    out: str
    layout: Literal["transformers", "sam3.pt"]
    kept: Table
    removed: Table
    added: Table
    student: dict[str, Any] = field(repr=False)
    """The student's configuration: a ``sam3.pt`` has no place for it, and it cannot be loaded without."""
    notes: tuple[str, ...] = ()

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Tensors, elements (parameters and buffers) and bytes of each of the three."""
        return {name: total(table) for name, table in self._tables().items()}

    def _tables(self) -> dict[str, Table]:
        return {"kept": self.kept, "removed": self.removed, "added": self.added}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: totals, and for each tensor its shape, dtype and bytes."""
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


def total(table: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Number of tensors, of elements and of bytes."""
    return {
        "tensors": len(table),
        "elements": sum(v.count for v in table.values()),
        "bytes": sum(v.bytes for v in table.values()),
    }


def grouped(table: Mapping[str, TensorInfo], depth: int | None = None) -> dict[str, dict[str, int]]:
    """Totals per module, a module being the first ``depth`` parts of a name (never its last part).

    Without ``depth``: the parts a reader of a merge cares for; encoders are told from necks, heads are taken whole.
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
    """``float32`` rather than ``torch.float32``."""
    return str(about.dtype).removeprefix("torch.")
