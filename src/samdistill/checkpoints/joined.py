"""The merged tensors of a teacher and a student: which are kept, removed and added, and how they are written.

A file or folder is read back and compared before it gets its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..io import make_folder, replacing, write_json, writing
from ..types import UserError
from .files import Weights, open_weights
from .hosting import check_loads, save_shards
from .layout import is_vit_tensor
from .processors import write_processor
from .report import REPORT, MergeReport, Table, sidecar
from .sam import OpenedSam
from .student import OpenedStudent
from .text import OpenedText


class Joined(Mapping[str, Tensor]):
    """The merged tensors by name, the teacher's first. A tensor is read when it is indexed.

    Args:
        teacher: Tensors of the teacher.
        student: Tensors of the student.
        kept: The teacher's tensors that stay, by name in the result.
        names: The student's own names to names in the result.
        origin: Names in the result to names in the teacher, where they differ.
    """

    def __init__(
        self, teacher: Mapping[str, Tensor], student: OpenedStudent | OpenedText, kept: Table, names: dict[str, str],
        origin: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self._teacher, self._student, self._origin = teacher, student, origin
        self._own = {merged: name for name, merged in names.items()}
        self.info: Table = {**kept, **{merged: student.info[name] for merged, name in self._own.items()}}

    def __getitem__(self, name: str) -> Tensor:
        own = self._own.get(name)
        return self._teacher[self._origin.get(name, name)] if own is None else self._student.weights[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)


def tables(
    teacher: Weights | OpenedSam,
    student: OpenedStudent | OpenedText,
    names: dict[str, str],
    replace: str,
    vit: bool = False,
) -> tuple[Table, Table, Table]:
    """Return the kept, removed and added tensors. ``vit`` is whether the teacher's ViT may be kept.

    Raises:
        UserError: There is nothing to replace, tensors of the ViT would remain, or a kept and an added tensor have the
            same name.
    """
    removed = {name: about for name, about in teacher.info.items() if name.startswith(replace)}
    kept = {name: about for name, about in teacher.info.items() if name not in removed}
    if not removed:
        raise UserError(f"{teacher.source}: nothing to replace: no tensor starts with {replace!r}; wrong checkpoint?")
    residue = [name for name in kept if is_vit_tensor(name)]
    if residue and not vit:
        raise UserError(
            f"{teacher.source}: teacher residue: {len(residue)} tensors of its ViT are outside {replace!r} and would "
            f"remain, such as {residue[0]}; give a --replace-prefix that covers them"
        )
    added = {merged: student.info[name] for name, merged in names.items()}
    clash = sorted(set(added) & set(kept))
    if clash:
        raise UserError(f"{teacher.source}: {clash[0]} is a kept tensor and one of the student; change --target-prefix")
    return kept, removed, added


def write_folder(
    report: MergeReport, tensors: Joined, merged: dict[str, Any], companions: Callable[[Path], None]
) -> None:
    """Write a merged folder under a temporary name, check it, and rename it.

    Args:
        report: The report, with the name of the folder.
        tensors: The merged tensors.
        merged: Content of ``config.json``.
        companions: Writes the files beside the weights into a folder.
    """
    out = Path(report.out)
    make_folder(out.parent)
    with replacing(out, sync=True) as temporary:
        make_folder(temporary)
        companions(temporary)
        write_json(temporary / "config.json", merged, indent=2)
        write_processor(temporary)
        save_shards(temporary, tensors, tensors.info)
        _check_written(open_weights(temporary), tensors)
        check_loads(temporary, merged)
        write_json(temporary / REPORT, report.to_dict(), indent=1)


def write_file(report: MergeReport, tensors: Joined) -> MergeReport:
    """Write a merged ``sam3.pt`` under a temporary name, check it, rename it, and write the report beside it."""
    out = Path(report.out)
    make_folder(out.parent)
    with replacing(out, sync=True) as temporary:
        with writing(temporary) as file:
            torch.save({"model": {name: tensors[name] for name in tensors}}, file)
        _check_written(open_weights(temporary), tensors)
        write_json(sidecar(out), report.to_dict(), indent=1)
    return report


def all_of(student: OpenedStudent | OpenedText) -> dict[str, Tensor]:
    """Read all tensors of a student, by its own names."""
    return {name: student.weights[name] for name in student.info}


def _check_written(written: Weights, wanted: Joined) -> None:
    """Check that the file holds every tensor of ``wanted``, bit for bit."""
    if written.info != wanted.info:
        raise RuntimeError(f"{written.source}: what was written is not what was meant; nothing is kept of it")
    for name in wanted:
        if not torch.equal(_bits(written[name]), _bits(wanted[name])):
            raise UserError(
                f"{written.source}: {name} changed on disk after it was written; check the disk and merge again"
            )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
