"""What the students weigh, beside the teacher they replace: the data behind ``samdistill models``."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch
from torch import nn

from ..ops.flops import count_flops
from .backbones import STUDENTS, resolve_backbone
from .heads import HEADS
from .trunk import StudentTrunk, StudentTrunkConfig

TEACHER_TRUNK_PARAMS = 446_236_672
"""Parameters of SAM 3's ViT in transformers (``Sam3ViTModel`` of the default config), necks left out."""


@dataclass(frozen=True)
class StudentInfo:
    """One row of ``samdistill models``. config: the packaged recipe. teacher_share: ``trunk_params`` over those of
    SAM 3's ViT (``TEACHER_TRUNK_PARAMS``), both without neck or head, in 0..1."""

    name: str
    backbone: str
    config: str
    trunk_params: int
    head_params: int
    teacher_share: float


@dataclass(frozen=True)
class ModuleInfo:
    """One module of a student. gflops: for one image, a multiply-add counted as two."""

    module: str
    params: int
    gflops: float


@dataclass(frozen=True)
class Breakdown:
    """A student by module: the backbone's children in order, then the head's. channels and strides: of the maps that
    the head can use, finest first; map_sizes: their height in pixels."""

    name: str
    backbone: str
    head: str
    channels: list[int]
    strides: list[int]
    map_sizes: list[int]
    trunk_params: int
    head_params: int
    trunk_gflops: float
    head_gflops: float
    modules: list[ModuleInfo]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the ready-made students that match a shell pattern, in order.

    Any other timm model with feature maps can be a student too; timm's own ``list_models`` has their names.

    Args:
        pattern: With ``*``, ``?`` and ``[...]``, as in ``fnmatch``.

    Example:
        >>> list_models("es_rv_*")
        ['es_rv_l', 'es_rv_m', 'es_rv_s']
    """
    return sorted(fnmatch.filter(STUDENTS, pattern))


def list_students(head: str = "fused", hidden_size: int = 1024) -> list[StudentInfo]:
    """The nine students with ``head`` to a teacher of ``hidden_size`` channels. Allocates nothing."""
    rows = []
    for row in STUDENTS.values():
        trunk = _on_meta(row.backbone, head, hidden_size, image_size=1008)
        trunk_params = count(trunk.backbone)
        share = trunk_params / TEACHER_TRUNK_PARAMS
        rows.append(StudentInfo(row.name, row.backbone, f"encoder/{row.name}", trunk_params, count(trunk.head), share))
    return rows


def breakdown(name: str, head: str = "fused", hidden_size: int = 1024, image_size: int = 1008) -> Breakdown:
    """One student (or any timm backbone) by module, with the work of each for one image of ``image_size`` pixels.

    FLOPs are counted on the meta device: convolutions, matrix products and attention, two per multiply-add. Raises
    ``UserError`` for an unknown name or head.
    """
    trunk = _on_meta(name, head, hidden_size, image_size).eval()
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    sizes: dict[int, int] = {}
    hook = trunk.head.register_forward_pre_hook(lambda _, args: sizes.update(enumerate(m.shape[-2] for m in args[0])))
    with count_flops() as counter:
        trunk(images)
    hook.remove()
    by_path = {path: sum(ops.values()) / 1e9 for path, ops in counter.get_flop_counts().items()}
    root = type(trunk).__name__
    modules = [
        ModuleInfo(f"{part}.{child}", count(module), _gflops(module, f"{root}.{part}.{child}", by_path))
        for part in ("backbone", "head")
        for child, module in getattr(trunk, part).named_children()
    ]
    return Breakdown(
        name=name,
        backbone=resolve_backbone(name),
        head=head,
        channels=[level.channels for level in trunk.levels],
        strides=[level.stride for level in trunk.levels],
        map_sizes=[sizes[i] for i in range(len(sizes))],
        trunk_params=count(trunk.backbone),
        head_params=count(trunk.head),
        trunk_gflops=by_path.get(f"{root}.backbone", 0.0),
        head_gflops=by_path.get(f"{root}.head", 0.0),
        modules=modules,
    )


def _gflops(module: nn.Module, path: str, by_path: dict[str, float]) -> float:
    """Of a module, or of its children where it is a container that is never called itself."""
    if path in by_path:
        return by_path[path]
    return sum(_gflops(child, f"{path}.{name}", by_path) for name, child in module.named_children())


def count(module: nn.Module) -> int:
    """Parameters; BatchNorm's running statistics are not among them."""
    return sum(p.numel() for p in module.parameters())


def _on_meta(backbone: str, head: str, hidden_size: int, image_size: int) -> StudentTrunk:
    HEADS.get(head)
    config = StudentTrunkConfig(backbone=backbone, head=head, hidden_size=hidden_size, image_size=image_size)
    with torch.device("meta"):
        return StudentTrunk(config)
