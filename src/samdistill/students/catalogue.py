"""Sizes and work of the students in comparison with the teacher's trunk, for ``samdistill models``."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch
from torch import nn

from ..ops.flops import count_flops
from .backbones import STUDENTS, resolve_backbone
from .heads import HEADS
from .text import TextStudent, text_student_config
from .trunk import StudentTrunk, StudentTrunkConfig

TEACHER_PARTS = {
    "trunk": 446_236_672, "neck": 7_802_112, "text encoder with projection": 353_724_672,
    "geometry encoder": 8_083_456, "DETR encoder and decoder": 21_047_605, "mask decoder": 2_298_881,
    "scoring": 1_182_976,
}  # fmt: skip
"""Parameters of SAM 3's image model, transformers' ``Sam3Model`` with the default configuration."""
TEACHER_PARAMS = sum(TEACHER_PARTS.values())
TEACHER_TRUNK_PARAMS = TEACHER_PARTS["trunk"]
PUBLISHED = (
    "860.06M published, of them vision 461.84M and text 353.72M; Sam3Model has 840.38M, because the file "
    "also holds the tracker on the same ViT, with a second neck of 7.80M (vision: 446.24 + 2 x 7.80)"
)
"""The published parameters of SAM 3, and why those of transformers' model differ."""
"""Parameters of SAM 3's ViT, without necks."""


@dataclass(frozen=True)
class StudentInfo:
    """A row of ``samdistill models``.

    Attributes:
        name: Name of the student.
        backbone: timm name of the backbone.
        config: Name of the packaged recipe.
        trunk_params: Parameters of the backbone.
        head_params: Parameters of the head.
        teacher_share: ``trunk_params`` divided by those of SAM 3's ViT (``TEACHER_TRUNK_PARAMS``), in 0..1.
    """

    name: str
    backbone: str
    config: str
    trunk_params: int
    head_params: int
    teacher_share: float


@dataclass(frozen=True)
class ModuleInfo:
    """A module of a student.

    Attributes:
        module: Name of the module, such as ``backbone.stages_0``.
        params: Number of parameters.
        gflops: Work for one image, in 1e9 operations. A multiply-add counts as two.
    """

    module: str
    params: int
    gflops: float


@dataclass(frozen=True)
class Breakdown:
    """A student by module.

    Attributes:
        name: The name that was given.
        backbone: timm name of the backbone.
        head: Name of the head.
        channels: Channels of the maps that the head can use, finest first.
        strides: Strides of these maps in pixels.
        map_sizes: Heights of these maps in cells.
        trunk_params, head_params: Number of parameters.
        trunk_gflops, head_gflops: Work for one image, in 1e9 operations.
        modules: The backbone's children in order, then the head's.
    """

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


def hosted_parts(backbone: str = "es_rv_l", text: str = "s0") -> dict[str, int]:
    """Return the parameters of a hosted student of SAM 3 by part, with the names of ``TEACHER_PARTS``.

    Args:
        backbone: A student's name or a timm name. Its head is ``fused``.
        text: Size of the text encoder, see ``TEXT_SIZES``.

    Example:
        >>> sum(hosted_parts().values())
        106875070
    """
    trunk = _on_meta(backbone, "fused", 1024, 1008)
    with torch.device("meta"):
        words = TextStudent(text_student_config(text, context=32, vocab_size=49408, width=256))
    return TEACHER_PARTS | {"trunk": count(trunk), "text encoder with projection": count(words)}


def part_rows() -> list[tuple[str, str, str, str]]:
    """Return name, millions of parameters in SAM 3 and in ``hosted_parts``, and time of training of each part."""
    parts, trained = hosted_parts(), {"trunk": "yes", "text encoder with projection": "before, in a text run"}
    rows = [(name, size, parts[name], trained.get(name, "no")) for name, size in TEACHER_PARTS.items()]
    rows.append(("all", TEACHER_PARAMS, sum(parts.values()), ""))
    return [(name, f"{teacher / 1e6:.3f}", f"{hosted / 1e6:.3f}", trains) for name, teacher, hosted, trains in rows]


def list_models(pattern: str = "*") -> list[str]:
    """Return the sorted names of the students that match a shell pattern.

    Any other timm model with feature maps can be a student too. timm's own ``list_models`` returns their names.

    Args:
        pattern: Pattern with ``*``, ``?`` and ``[...]``, as in ``fnmatch``.

    Returns:
        The names. The list is empty if none matches.

    Example:
        >>> list_models("es_rv_*")
        ['es_rv_l', 'es_rv_m', 'es_rv_s']
    """
    return sorted(fnmatch.filter(STUDENTS, pattern))


def list_students(head: str = "fused", hidden_size: int = 1024) -> list[StudentInfo]:
    """Return the sizes of the nine students. No weights are allocated.

    Args:
        head: Name of the head.
        hidden_size: Channels of the teacher's embedding.
    """
    rows = []
    for row in STUDENTS.values():
        trunk = _on_meta(row.backbone, head, hidden_size, image_size=1008)
        trunk_params = count(trunk.backbone)
        share = trunk_params / TEACHER_TRUNK_PARAMS
        rows.append(StudentInfo(row.name, row.backbone, f"encoder/{row.name}", trunk_params, count(trunk.head), share))
    return rows


def breakdown(name: str, head: str = "fused", hidden_size: int = 1024, image_size: int = 1008) -> Breakdown:
    """Count parameters and work of a student by module.

    Work is counted on the meta device: convolutions, matrix products and attention, two operations per multiply-add.

    Args:
        name: A student's name or a timm name.
        head: Name of the head.
        hidden_size: Channels of the teacher's embedding.
        image_size: Side of the square input in pixels.

    Raises:
        UserError: The name or the head is unknown.

    Example:
        >>> breakdown("es_rv_m").trunk_gflops
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
    """Work of a module. For a container that is never called itself it is the sum over its children."""
    if path in by_path:
        return by_path[path]
    return sum(_gflops(child, f"{path}.{name}", by_path) for name, child in module.named_children())


def count(module: nn.Module) -> int:
    """Number of parameters. The running statistics of batch norms are not included."""
    return sum(p.numel() for p in module.parameters())


def _on_meta(backbone: str, head: str, hidden_size: int, image_size: int) -> StudentTrunk:
    HEADS.get(head)
    config = StudentTrunkConfig(backbone=backbone, head=head, hidden_size=hidden_size, image_size=image_size)
    with torch.device("meta"):
        return StudentTrunk(config)
