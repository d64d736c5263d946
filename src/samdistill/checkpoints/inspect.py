"""What is in a path: a model folder, a run, a feature store, a weight file. Reads names and shapes, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..reading import Table as Settings
from ..reading import foreign, read_json
from ..types import UserError
from .files import SANDBOX, TORCH_SUFFIXES, TensorInfo, load_torch, locate, open_weights
from .layout import HF_TRUNK, ORIGINAL_STUDENT, STUDENT, is_vit_tensor, vision_configs
from .loading import read_settings
from .report import Table, dtype_name, grouped, total

Kind = Literal["model folder", "student folder", "run", "feature store", "torch file", "safetensors file"]


@dataclass(frozen=True)
class Inspection:
    """What was found. Counts are of tensor elements, so batch-norm statistics are in them.

    trunk: whose image trunk it has: ``teacher`` (SAM 3's ViT), ``student``, ``both`` (a merge gone wrong: teacher
    residue) or ``none``. modules: totals per module, two levels deep. dtypes: elements per type. parts: what a run
    folder contains. facts: whatever else the files say about themselves.
    """

    path: str
    kind: Kind
    trunk: Literal["teacher", "student", "both", "none"]
    tensors: int
    elements: int
    bytes: int
    dtypes: dict[str, int]
    modules: dict[str, dict[str, int]]
    facts: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Inspection, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return self.__dict__ | {"parts": [part.to_dict() for part in self.parts]}

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}"]
        lines += [f"  {key}: {value}" for key, value in self.facts.items()]
        if self.tensors:
            types = ", ".join(f"{name} {count / 1e6:.3f} M" for name, count in self.dtypes.items())
            lines.append(f"  {self.tensors} tensors, {self.elements / 1e6:.3f} M, {self.bytes / 1e6:.1f} MB ({types})")
            lines.append(f"  image trunk: {self.trunk}" + (" (teacher residue)" if self.trunk == "both" else ""))
            width = max(map(len, self.modules))
            lines += [f"  {name:{width}}  {s['elements'] / 1e6:10.3f} M" for name, s in self.modules.items()]
        for part in self.parts:
            lines += [f"  {line}" for line in str(part).splitlines()]
        return "\n".join(lines)


def inspect_path(path: str | Path) -> Inspection:
    """Look into a Hugging Face folder, a run folder, a feature store or a ``.pt`` or ``.safetensors`` file.

    Raises ``UserError`` for a path that is not there, that cannot be read, or that is none of these.
    """
    place = locate(path) if str(path) == SANDBOX else Path(path).expanduser()  # local: nothing is downloaded to look
    if not place.exists():
        raise UserError(f"{place}: no such file or folder")
    if place.is_file():
        return _file(place)
    if not place.is_dir():
        raise UserError(f"{place}: neither a file nor a folder")
    if (place / "manifest.json").is_file():
        return _store(place)
    if (place / "config.yaml").is_file() or any(place.glob("ckpt_epoch_*.pt")):
        return _run(place)
    if (place / "config.json").is_file():
        return _model(place)
    raise UserError(f"{place}: neither a model (config.json), a run (config.yaml) nor a feature store (manifest.json)")


def _file(path: Path) -> Inspection:
    if path.suffix == ".safetensors":
        return _weights(path, "safetensors file", open_weights(path).info, {})
    if path.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{path}: not a weight file (.safetensors, {', '.join(TORCH_SUFFIXES)})")
    table: Table = {}
    facts: dict[str, Any] = {}
    with foreign(path, "not a readable table of tensors"):
        _flatten(load_torch(path), "", table, facts)
    return _weights(path, "torch file", table, facts)


def _flatten(node: Mapping[Any, Any], prefix: str, table: Table, facts: dict[str, Any]) -> None:
    """Every tensor of nested dictionaries and lists under a dotted name; short values of the top level as facts."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            table[name] = TensorInfo.of(value)
        elif isinstance(value, Mapping):
            _flatten(value, f"{name}.", table, facts)
        elif isinstance(value, list | tuple):
            _flatten(dict(enumerate(value)), f"{name}.", table, facts)
        elif not prefix and isinstance(value, int | float | str) and len(str(value)) < 80:
            facts[name] = value


def _model(folder: Path) -> Inspection:
    config = read_settings(folder)
    facts: dict[str, Any] = {"model_type": config.get("model_type"), "architectures": config.get("architectures")}
    if config.get("model_type") == STUDENT:
        facts |= {key: config.get(key) for key in ("backbone", "head", "hidden_size", "image_size")}
        return _weights(folder, "student folder", open_weights(folder).info, facts, student=True)
    if str(config.get("model_type")).startswith("sam3"):
        with foreign(folder / "config.json", "not a readable configuration"):
            trunk = dict(vision_configs(config)[0].get("backbone_config") or {})
        facts |= {
            f"trunk {key}": trunk[key] for key in ("model_type", "backbone", "head", "image_size") if key in trunk
        }
    return _weights(folder, "model folder", open_weights(folder).info, facts)


def _run(folder: Path) -> Inspection:
    parts: list[Inspection] = []
    if (folder / "student" / "config.json").is_file():
        parts.append(_model(folder / "student"))
    if (folder / "embeddings" / "manifest.json").is_file():
        parts.append(_store(folder / "embeddings"))
    checkpoints = sorted(folder.glob("ckpt_*.pt"), key=lambda p: p.stat().st_mtime)
    facts = {"checkpoints": [p.name for p in checkpoints], "finished": (folder / "student").is_dir()}
    return Inspection(str(folder), "run", "none", 0, 0, 0, {}, {}, facts, tuple(parts))


def _store(folder: Path) -> Inspection:
    manifest = read_json(folder / "manifest.json", Settings)
    values = sorted(folder.glob("rank*-values.bin"))
    record, size = manifest.get("record_bytes"), sum(p.stat().st_size for p in values)
    facts = {key: value for key, value in manifest.items() if value is not None}
    facts |= {"ranks": len(values), "value_bytes": size}
    if isinstance(record, int) and record > 0:
        facts["records"] = size // record
    return Inspection(str(folder), "feature store", "none", 0, 0, 0, {}, {}, facts)


def _weights(path: Path, kind: Kind, table: Table, facts: dict[str, Any], student: bool = False) -> Inspection:
    if not table:
        raise UserError(f"{path}: holds no tensors")
    sums = total(table)
    dtypes: dict[str, int] = {}
    for about in table.values():
        dtypes[dtype_name(about)] = dtypes.get(dtype_name(about), 0) + about.count
    teacher = any(is_vit_tensor(name) for name in table)
    student = student or any(_in_student(name) for name in table)
    trunk: Any = {(0, 0): "none", (1, 0): "teacher", (0, 1): "student", (1, 1): "both"}[teacher, student]
    return Inspection(
        str(path), kind, trunk, sums["tensors"], sums["elements"], sums["bytes"], dtypes, grouped(table, 2), facts
    )


def _in_student(name: str) -> bool:
    """A tensor of a student's trunk inside SAM 3: timm's backbone or the head, where the ViT has neither."""
    for prefix in (HF_TRUNK, ORIGINAL_STUDENT):
        if prefix in name and name.split(prefix, 1)[1].startswith(("backbone.", "head.")):
            return True
    return False


__all__ = ["Inspection", "inspect_path"]
