"""Inspection of a model folder, a run, a feature store or a weight file. Names and shapes are read, weights are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..reading import Table as Settings
from ..reading import foreign, read_json
from ..types import UserError
from .files import SANDBOX, STUDENT_FOLDER, TORCH_SUFFIXES, TensorInfo, load_torch, locate, open_weights
from .layout import HF_TRUNK, ORIGINAL_STUDENT, STUDENT_TRUNK, is_vit_tensor, vision_configs
from .loading import read_settings
from .report import Table, dtype_name, grouped, total

Kind = Literal["model folder", "student folder", "run", "feature store", "torch file", "safetensors file"]


@dataclass(frozen=True)
class Inspection:
    """Contents of an inspected path. Counts are of tensor elements, so they include batch-norm statistics.

    Attributes:
        path: The inspected path.
        kind: What the path is.
        trunk: The image trunk in it: ``teacher`` (SAM 3's ViT), ``student``, ``none``, or ``both``, which is a failed
            merge that left tensors of the teacher behind.
        tensors: Number of tensors.
        elements: Number of elements of all tensors.
        bytes: Size of all tensors.
        dtypes: Number of elements per dtype.
        modules: Tensors, elements and bytes per module, two levels deep.
        facts: Further values from the files, such as the model type.
        parts: Inspections of the parts of a run folder.
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
        """Return the inspection as a JSON-serialisable dictionary."""
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
    """Inspect a Hugging Face folder, a run folder, a feature store, or a ``.pt`` or ``.safetensors`` file.

    Args:
        path: A local path, or ``sandbox``. Nothing is downloaded.

    Returns:
        The kind of the path, and its tensors by module and dtype. ``print`` shows it as text.

    Raises:
        UserError: The path is missing, cannot be read, or is none of these.

    Example:
        >>> samdistill.inspect("sandbox").trunk
        'teacher'
    """
    place = locate(path) if str(path) == SANDBOX else Path(path).expanduser()  # an inspection never downloads
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
    """Collect the tensors of nested dictionaries and lists under dotted names, and short top-level values as facts."""
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
    if config.get("model_type") == STUDENT_TRUNK:
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
    if (folder / STUDENT_FOLDER / "config.json").is_file():
        parts.append(_model(folder / STUDENT_FOLDER))
    if (folder / "embeddings" / "manifest.json").is_file():
        parts.append(_store(folder / "embeddings"))
    checkpoints = sorted(folder.glob("ckpt_*.pt"), key=lambda p: p.stat().st_mtime)
    facts = {"checkpoints": [p.name for p in checkpoints], "finished": (folder / STUDENT_FOLDER).is_dir()}
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
    """Whether a tensor is part of a student's trunk inside SAM 3: the ViT has neither ``backbone`` nor ``head``."""
    for prefix in (HF_TRUNK, ORIGINAL_STUDENT):
        if prefix in name and name.split(prefix, 1)[1].startswith(("backbone.", "head.")):
            return True
    return False


__all__ = ["Inspection", "inspect_path"]
