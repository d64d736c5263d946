"""Replacement of a teacher's ViT or text encoder by a student's, with a record of the kept, removed and added tensors.

Layouts of SAM 3: a Hugging Face folder of ``Sam3Model``, ``Sam3LiteTextModel``, ``Sam3TrackerModel`` or
``Sam3VideoModel``, and the original ``sam3.pt``. With a small text encoder the result is always a folder, of a
``Sam3LiteTextModel``. A SAM, in a folder or an original file, gives a folder of a ``HostedSamModel``; a SAM 2
gives one of a ``Sam2Model`` or ``Sam2VideoModel``. The merged file is read back and compared before it gets its name. A
merge that fails leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import Sam3Config

from ..io import as_path, make_folder, replacing, write_json, writing
from ..types import UserError
from .files import TORCH_SUFFIXES, TensorInfo, Weights, locate, open_weights
from .hosting import check_loads, check_shapes, copy_companions, host_config, host_of, save_shards
from .layout import ORIGINAL_STUDENT, ORIGINAL_TRUNK, hf_trunk_prefix, is_vit_tensor, neck_inputs
from .loading import open_config, read_settings
from .original import merged_state, original_config
from .processors import write_processor
from .rename import hf_names, to_hf
from .report import REPORT, MergeReport, Table, merged_student, sidecar
from .sam import SAM_TYPES, OpenedSam, open_sam, sam_kind
from .sam_hosting import ENCODER, bridged, host_of_sam, hosted_settings, refuse_prefixes
from .student import Host, OpenedStudent, as_json, original_student_name, read_student
from .text import (
    TEXT_PREFIXES,
    OpenedText,
    copy_words,
    lite_config,
    read_text,
    split_text,
    text_folder,
    text_tensors,
)

_PATCH, _IMAGE_SIZE = 14, 1008  # values of the only published sam3.pt, since the file has no configuration


def merge(
    source: str | Path, into: str | Path, out: str | Path, target_prefix: str | None = None,
    replace_prefix: str | None = None,
) -> MergeReport:  # fmt: skip
    """Merge a student into a teacher: write ``into`` with its image trunk or text encoder replaced by a student.

    For both, merge one into the teacher and the other one into the result.

    Args:
        source: A run folder or a student's folder of the encoder or the text job, or a ``ckpt_epoch_{n}.pt`` of the
            encoder job.
        into: The teacher: a Hugging Face folder, a hub id, ``sandbox``, or an original ``sam3.pt``,
            ``sam_vit_*.pth`` or ``sam2*_hiera_*.pt``.
        out: The result, in the layout of ``into``, or a folder for a text encoder and for a SAM. For a folder: a
            folder, with the report in ``merge.json``. For a ``sam3.pt``: a file with ``{"model": ...}``, with the
            report and the student's configuration in ``out.merge.json`` beside it. A result of an earlier merge in the
            same layout, or an empty folder for a folder, is replaced.
        target_prefix: Prefix of the student's names in the result. None derives it from the layout.
        replace_prefix: Every tensor whose name starts with it is removed. None derives it from the layout.

    Returns:
        The kept, removed and added tensors with their shapes, dtypes and sizes.

    Raises:
        UserError: ``source`` has no student, there is nothing to replace, a tensor of the teacher's ViT would remain,
            two tensors would have the same name, the shapes of trunk and heads disagree, or ``out`` exists and cannot
            be replaced. Nothing is written in these cases.

    Example:
        >>> report = samdistill.merge("runs/mine", "sandbox", "merged")  # a run of the encoder job, and its teacher
        >>> sorted(report.totals)
        ['added', 'kept', 'removed']
    """
    student_place, out = as_path(source), as_path(out)
    text = text_folder(student_place)
    place = locate(into, packaged="tracker" if text is None else "detector")
    if text is not None:
        if target_prefix or replace_prefix:
            raise UserError("--target-prefix and --replace-prefix are for an image trunk, not for a text encoder")
        _check_out(out, place, folder=True)
        return _text_into(read_text(text), place, out)
    if sam_kind(place) in SAM_TYPES:
        refuse_prefixes(target_prefix, replace_prefix)
        _check_out(out, place, folder=True)
        return _into_sam(student_place, open_sam(place), out)
    _check_out(out, place, folder=place.is_dir())
    if place.is_dir():
        return _into_folder(student_place, place, out, target_prefix, replace_prefix)
    if place.suffix in TORCH_SUFFIXES:
        return _into_original(student_place, place, out, target_prefix, replace_prefix)
    raise UserError(
        f"{place}: a student is merged into a Hugging Face folder or an original sam3.pt, not into this file"
    )


def _into_folder(
    source: Path, folder: Path, out: Path, target_prefix: str | None, replace_prefix: str | None
) -> MergeReport:
    teacher, config = open_weights(folder), read_settings(folder)
    open_config(folder)  # raises if a part of the configuration is of a wrong type
    trunk = hf_trunk_prefix(teacher)
    if trunk is None and (target_prefix is None or replace_prefix is None):
        raise UserError(f"{folder}: nothing to replace: no vision_encoder.backbone in it; is it a SAM 3 model?")
    host = host_of(config, folder / "config.json")
    student = read_student(source, host)
    names = {name: (target_prefix or trunk or "") + name for name in student.info}
    kept, removed, added = _tables(teacher, student, names, replace_prefix or trunk or "")
    check_shapes(student, host, kept, folder)
    merged = host_config(config, host, student.config)
    notes = []
    if student.config.image_size != host.image_size:
        notes.append(f"input size changed from {host.image_size} to the student's {student.config.image_size} pixels")
    report = MergeReport(
        str(student.source), str(folder), str(out), "transformers", kept, removed, added, as_json(student.config),
        tuple(notes),
    )  # fmt: skip
    tensors = _Joined(teacher, student, kept, names)
    _write_folder(report, tensors, merged, lambda to: copy_companions(folder, to))
    return report


def _into_sam(source: Path, opened: OpenedSam, out: Path) -> MergeReport:
    student = bridged(read_student(source, host_of_sam(opened)), opened)
    names = {name: ENCODER + name for name in student.info}
    kept, removed, added = _tables(opened, student, names, ENCODER)
    report = MergeReport(
        str(student.source), str(opened.source), str(out), "transformers", kept, removed, added,
        as_json(student.config),
    )  # fmt: skip
    folder = opened.source if opened.source.is_dir() else None
    _write_folder(report, _Joined(opened.weights, student, kept, names), hosted_settings(opened, student.config),
                  lambda to: None if folder is None else copy_companions(folder, to))  # fmt: skip
    return report


def _text_into(student: OpenedText, place: Path, out: Path) -> MergeReport:
    teacher: Weights | dict[str, Tensor] = open_weights(place)
    if place.is_dir():
        settings = read_settings(place)
        open_config(place)  # raises if a part of the configuration is of a wrong type
    else:
        settings = as_json(original_config(place, Sam3Config))
        merged_before = any(name.startswith(ORIGINAL_STUDENT) for name in teacher)
        teacher = merged_state(teacher, merged_student(place)) if merged_before else to_hf(teacher)[0]
    merged = lite_config(settings, student.config, place)
    origin, others = split_text(teacher)
    if not text_tensors(others):
        raise UserError(f"{place}: nothing to replace: no {TEXT_PREFIXES[0]} in it; is it a SAM 3 detector?")
    info = teacher.info if isinstance(teacher, Weights) else {name: TensorInfo.of(t) for name, t in teacher.items()}
    kept = {name: info[there] for name, there in origin.items()}
    notes = []
    if len(others) > len(text_tensors(others)):
        notes.append("the tracker is left out: transformers has no video model with a small text encoder")
    report = MergeReport(
        str(student.source), str(place), str(out), "transformers", kept, {name: info[name] for name in others},
        dict(student.info), as_json(student.config), tuple(notes),
    )  # fmt: skip

    def companions(to: Path) -> None:
        if place.is_dir():
            copy_companions(place, to)
        copy_words(student.source, to)

    _write_folder(report, _Joined(teacher, student, kept, {name: name for name in student.info}, origin), merged,
                  companions)  # fmt: skip
    return report


def _write_folder(
    report: MergeReport, tensors: _Joined, merged: dict[str, Any], companions: Callable[[Path], None]
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


def _into_original(
    source: Path, path: Path, out: Path, target_prefix: str | None, replace_prefix: str | None
) -> MergeReport:
    teacher = open_weights(path)
    replace, target = replace_prefix or ORIGINAL_TRUNK, target_prefix or ORIGINAL_STUDENT
    channels = set(neck_inputs({n: i for n, i in teacher.info.items() if "vision_backbone" in n}).values())
    if not channels:
        raise UserError(f"{path}: nothing to merge into: no necks (vision_backbone.convs) in it; is it a sam3.pt?")
    host = Host(max(channels), _PATCH, _IMAGE_SIZE)
    student = read_student(source, host)
    names = {name: target + original_student_name(name) for name in student.info}
    kept, removed, added = _tables(teacher, student, names, replace)
    check_shapes(student, host, kept, path)
    unknown = [n for n in kept if n.startswith("detector.") and not hf_names(n)]
    notes = [] if teacher.wrapped else ['the teacher\'s file had no "model" wrapper; the merged one has']
    if unknown:
        notes.append(f"{len(unknown)} kept detector tensors have no counterpart in Sam3Model, such as {unknown[0]}")
    if student.config.image_size != host.image_size:
        notes.append(f"the student was trained at {student.config.image_size} pixels; sam3.pt readers default to 1008")
    report = MergeReport(
        str(student.source),
        str(path),
        str(out),
        "sam3.pt",
        kept,
        removed,
        added,
        as_json(student.config),
        tuple(notes),
    )
    tensors = _Joined(teacher, student, kept, names)
    make_folder(out.parent)
    with replacing(out, sync=True) as temporary:
        with writing(temporary) as file:
            torch.save({"model": {name: tensors[name] for name in tensors}}, file)
        _check_written(open_weights(temporary), tensors)
        write_json(sidecar(out), report.to_dict(), indent=1)
    return report


class _Joined(Mapping[str, Tensor]):
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


def _tables(
    teacher: Weights | OpenedSam, student: OpenedStudent, names: dict[str, str], replace: str
) -> tuple[Table, Table, Table]:
    """Return the kept, removed and added tensors.

    Raises:
        UserError: There is nothing to replace, tensors of the ViT would remain, or a kept and an added tensor have the
            same name.
    """
    removed = {name: about for name, about in teacher.info.items() if name.startswith(replace)}
    kept = {name: about for name, about in teacher.info.items() if name not in removed}
    if not removed:
        raise UserError(f"{teacher.source}: nothing to replace: no tensor starts with {replace!r}; wrong checkpoint?")
    residue = [name for name in kept if is_vit_tensor(name)]
    if residue:
        raise UserError(
            f"{teacher.source}: teacher residue: {len(residue)} tensors of its ViT are outside {replace!r} and would "
            f"remain, such as {residue[0]}; give a --replace-prefix that covers them"
        )
    added = {merged: student.info[name] for name, merged in names.items()}
    clash = sorted(set(added) & set(kept))
    if clash:
        raise UserError(f"{teacher.source}: {clash[0]} is a kept tensor and one of the student; change --target-prefix")
    return kept, removed, added


def _check_written(written: Weights, wanted: _Joined) -> None:
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


def _check_out(out: Path, into: Path, folder: bool) -> None:
    """Raise ``UserError`` if ``out`` cannot be replaced by a result, which is a ``folder`` or a file."""
    if out.resolve() == into.resolve():
        raise UserError(f"{out}: --out and --into are the same; the teacher is never overwritten")
    if out.exists() and not sidecar(out).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists and is not the result of a merge; choose another --out, or remove it first")
    if out.exists() and out.is_dir() != folder:
        raise UserError(f"{out}: holds an earlier merge of the other layout; choose another --out, or remove it first")
