"""Replacement of a teacher's ViT or text encoder by a student's, with a record of the kept, removed and added tensors.

Layouts of SAM 3: a Hugging Face folder of ``Sam3Model``, ``Sam3LiteTextModel``, ``Sam3TrackerModel`` or
``Sam3VideoModel``, and the original ``sam3.pt``. With a small text encoder the result is always a folder, of a
``Sam3LiteTextModel``. A SAM, in a folder or an original file, gives a folder of a ``HostedSamModel``; a SAM 2
gives one of a ``Sam2Model`` or ``Sam2VideoModel``. The merged file is read back and compared before it gets its name. A
merge that fails leaves nothing behind.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Sam3Config

from ..io import as_path, copy_file, scratch, write_json
from ..types import UserError
from .efficientsam3 import merged_trunk, write_text, write_trunk
from .files import TORCH_SUFFIXES, TensorInfo, Weights, locate, open_weights
from .hosting import check_shapes, copy_companions, host_config, host_of
from .joined import Joined, all_of, tables, write_file, write_folder
from .layout import (
    HF_TRUNK,
    ORIGINAL_STUDENT,
    ORIGINAL_TEXT,
    ORIGINAL_TRUNK,
    hf_trunk_prefix,
    neck_inputs,
)
from .loading import CONFIG, open_config, read_settings
from .original import merged_config, merged_state, open_original, original_config
from .rename import hf_names, to_hf
from .report import MergeReport, sidecar
from .sam import SAM_TYPES, open_sam, sam_kind
from .sam_hosting import ENCODER, bridged, host_of_sam, hosted_settings, refuse_prefixes
from .student import Host, OpenedStudent, as_json, original_student_name, read_student
from .text import (
    TEXT_PREFIXES,
    OpenedText,
    copy_words,
    lite_config,
    read_text,
    split_text,
    text_tensors,
)

OURS, EFFICIENTSAM3 = NAMES = ("samdistill", "efficientsam3")
"""Names of a student's tensors in a merged ``sam3.pt``: timm's and transformers', or those that EfficientSAM3's code
reads.
"""
FOLDED = (
    "the first convolution takes over the student's normalisation, which EfficientSAM3's code lacks: outputs differ "
    "near the image's edge; a student that was trained with student.host_statistics=true is exact"
)
_PATCH, _IMAGE_SIZE = 14, 1008  # values of the only published sam3.pt, since the file has no configuration


def merge(
    source: str | Path, into: str | Path, out: str | Path, target_prefix: str | None = None,
    replace_prefix: str | None = None, names: str = OURS, text: str | Path | None = None,
) -> MergeReport:  # fmt: skip
    """Merge a student into a teacher: write ``into`` with its image trunk or text encoder replaced by a student.

    Args:
        source: A run folder or a student's folder of the encoder or the text job, a ``ckpt_epoch_{n}.pt`` of the
            encoder job, or a file of EfficientSAM3: a student of its first stage, or a merged one.
        into: The teacher: a Hugging Face folder, a hub id, ``sandbox``, or an original ``sam3.pt``,
            ``sam_vit_*.pth`` or ``sam2*_hiera_*.pt``.
        out: The result, in the layout of ``into``. A text encoder goes into a file if ``out`` ends as one does, and
            otherwise into a folder, as a SAM always does. A folder has the report in ``merge.json``. A file holds
            ``{"model": ...}``, with the report and the student's configuration in ``out.merge.json`` beside it. A
            result of an earlier merge in the same layout, or an empty folder for a folder, is replaced.
        target_prefix: Prefix of the student's names in the result. None derives it from the layout.
        replace_prefix: Every tensor whose name starts with it is removed. None derives it from the layout.
        names: Names of the trunk's tensors in a ``sam3.pt``: ``samdistill``, or ``efficientsam3`` for a file that
            EfficientSAM3's code reads. A text encoder in a ``sam3.pt`` has EfficientSAM3's names in either case.
        text: A text student, like ``source``, that is merged together with the trunk of ``source``. ``into`` is then a
            detector.

    Returns:
        The kept, removed and added tensors with their shapes, dtypes and sizes.

    Raises:
        UserError: ``source`` has no student, there is nothing to replace, a tensor of the teacher's ViT would remain,
            two tensors would have the same name, the shapes of trunk and heads disagree, ``names`` has none for this
            student, or ``out`` exists and cannot be replaced. Nothing is written in these cases.

    Example:
        >>> report = samdistill.merge("runs/mine", "sandbox", "merged")  # a run of the encoder job, and its teacher
        >>> sorted(report.totals)
        ['added', 'kept', 'removed']
    """
    if names not in NAMES:
        raise UserError(f"--names must be {' or '.join(NAMES)}, got {names!r}")
    student_place, out = _existing(source), as_path(out)
    if text is not None:
        settings = (target_prefix, replace_prefix, names)
        return _both(student_place, _existing(text), locate(into, packaged="detector"), out, settings)
    words = read_text(student_place)
    place = locate(into, packaged="tracker" if words is None else "detector")
    if names == EFFICIENTSAM3 and place.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{place}: --names {names} is for an original sam3.pt, not for a Hugging Face folder")
    if words is not None:
        if target_prefix or replace_prefix:
            raise UserError("--target-prefix and --replace-prefix are for an image trunk, not for a text encoder")
        return _words_into(words, place, out, names)
    if sam_kind(place) in SAM_TYPES:
        refuse_prefixes(target_prefix, replace_prefix)
        return _into_sam(student_place, place, out, names)
    if place.is_file() and place.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{place}: give a Hugging Face folder or an original sam3.pt, not this file")
    _check_out(out, place, folder=place.is_dir())
    if place.is_dir():
        return _into_folder(student_place, place, out, target_prefix, replace_prefix)
    return _into_original(student_place, place, out, target_prefix, replace_prefix, names)


def _existing(given: str | Path) -> Path:
    """Return the path of a student. Raise ``UserError`` if nothing is there."""
    path = as_path(given)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a run, its student/ or a checkpoint")
    return path


def _both(
    source: Path, text: Path, place: Path, out: Path, settings: tuple[str | None, str | None, str]
) -> MergeReport:
    """Merge a trunk, and a text encoder into the result. ``settings`` are the trunk's prefixes and the names."""
    if read_text(source) is not None:
        raise UserError(f"{source}: a text encoder; give an image trunk first, and a text encoder with --text")
    words = read_text(text)
    if words is None:
        raise UserError(f"{text}: no text encoder; give an image trunk first, and a text encoder with --text")
    _hosted(words, place)  # raises before the trunk is written to a temporary folder
    _check_out(out, place, folder=place.is_dir() or (settings[2] == OURS and out.suffix not in TORCH_SUFFIXES))
    with scratch() as folder:
        middle = folder / (f"trunk{place.suffix}" if place.is_file() else "trunk")
        first = merge(source, place, middle, *settings)
        if place.is_file() and (place.parent / CONFIG).is_file():
            copy_file(place.parent / CONFIG, folder / CONFIG)
        second = merge(text, middle, out, names=settings[2])
    trunk = {name: about for name, about in second.kept.items() if name.startswith((ORIGINAL_STUDENT, HF_TRUNK))}
    report = replace(
        second, source=f"{first.source} and {second.source}", into=first.into, removed=first.removed | second.removed,
        kept={name: about for name, about in second.kept.items() if name not in trunk}, added=trunk | second.added,
        student=first.student, notes=first.notes + second.notes,
    )  # fmt: skip
    write_json(sidecar(out), report.to_dict(), indent=1)
    return report


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
    kept, removed, added = tables(teacher, student, names, replace_prefix or trunk or "")
    check_shapes(student, host, kept, folder)
    merged = host_config(config, host, student.config)
    notes = []
    if student.config.image_size != host.image_size:
        notes.append(f"input size changed from {host.image_size} to the student's {student.config.image_size} pixels")
    report = MergeReport(
        str(student.source), str(folder), str(out), "transformers", kept, removed, added, as_json(student.config),
        tuple(notes),
    )  # fmt: skip
    tensors = Joined(teacher, student, kept, names)
    write_folder(report, tensors, merged, lambda to: copy_companions(folder, to))
    return report


def _into_sam(source: Path, place: Path, out: Path, naming: str) -> MergeReport:
    if naming != OURS:
        raise UserError(f"{place}: --names {naming} is for a SAM 3, not for a SAM or a SAM 2")
    _check_out(out, place, folder=True)
    opened = open_sam(place)
    student = bridged(read_student(source, host_of_sam(opened)), opened)
    names = {name: ENCODER + name for name in student.info}
    kept, removed, added = tables(opened, student, names, ENCODER)
    report = MergeReport(
        str(student.source), str(opened.source), str(out), "transformers", kept, removed, added,
        as_json(student.config),
    )  # fmt: skip
    folder = opened.source if opened.source.is_dir() else None
    write_folder(report, Joined(opened.weights, student, kept, names), hosted_settings(opened, student.config),
                  lambda to: None if folder is None else copy_companions(folder, to))  # fmt: skip
    return report


def _words_into(student: OpenedText, place: Path, out: Path, naming: str) -> MergeReport:
    file = naming == EFFICIENTSAM3 or (place.is_file() and out.suffix in TORCH_SUFFIXES)
    _check_out(out, place, folder=not file)
    return _text_into_original(student, place, out, naming) if file else _text_into(student, place, out)


def _text_into(student: OpenedText, place: Path, out: Path) -> MergeReport:
    teacher: Weights | dict[str, Tensor] = open_weights(place) if place.is_dir() else open_original(place)
    merged = _hosted(student, place)
    if not place.is_dir():
        trunk = merged_config(place)
        teacher = to_hf(teacher)[0] if trunk is None else merged_state(teacher, trunk)
    origin, others = split_text(teacher)
    if not text_tensors(others):
        raise UserError(f"{place}: nothing to replace: no {TEXT_PREFIXES[0]} in it; is it a SAM 3 detector?")
    info = teacher.info if isinstance(teacher, Weights) else {name: TensorInfo.of(t) for name, t in teacher.items()}
    kept = {name: info[there] for name, there in origin.items()}
    notes = []
    if len(others) > len(text_tensors(others)):
        notes.append("the tracker is left out: transformers has no video model with a small text encoder")
    if student.config.attend_padding:
        notes.append(
            "the text encoder reads padding, which transformers' from_pretrained alone does not: use samdistill"
        )
    report = MergeReport(
        str(student.source), str(place), str(out), "transformers", kept, {name: info[name] for name in others},
        dict(student.info), as_json(student.config), tuple(notes),
    )  # fmt: skip

    def companions(to: Path) -> None:
        if place.is_dir():
            copy_companions(place, to)
        copy_words(student.source, to)

    write_folder(report, Joined(teacher, student, kept, {name: name for name in student.info}, origin), merged,
                  companions)  # fmt: skip
    return report


def _hosted(student: OpenedText, place: Path) -> dict[str, Any]:
    """Return the configuration of the SAM 3 at ``place`` with the text encoder ``student``."""
    if place.is_dir():
        open_config(place)  # raises if a part of the configuration is of a wrong type
    elif sam_kind(place) in SAM_TYPES:
        raise UserError(f"{place}: a SAM or a SAM 2 takes no words, so it cannot host a text encoder; give a SAM 3")
    settings = read_settings(place) if place.is_dir() else as_json(original_config(place, Sam3Config))
    return lite_config(settings, student.config, place)


def _into_original(
    source: Path, path: Path, out: Path, target_prefix: str | None, replace_prefix: str | None, naming: str
) -> MergeReport:
    teacher = open_original(path)
    replace, target = replace_prefix or ORIGINAL_TRUNK, target_prefix or ORIGINAL_STUDENT
    channels = set(neck_inputs({n: i for n, i in teacher.info.items() if "vision_backbone" in n}).values())
    if not channels:
        raise UserError(f"{path}: nothing to merge into: no necks (vision_backbone.convs) in it; is it a sam3.pt?")
    host = Host(max(channels), _PATCH, _IMAGE_SIZE)
    student = read_student(source, host)
    check_shapes(student, host, {n: i for n, i in teacher.info.items() if not n.startswith(replace)}, path)
    notes = [] if teacher.wrapped else ['the teacher\'s file had no "model" wrapper; the merged one has']
    if naming == EFFICIENTSAM3:
        if (student.config.input_mean, student.config.input_std) != (student.config.host_mean, student.config.host_std):
            notes.append(FOLDED)
        student = OpenedStudent.of(student.source, *write_trunk(student.config, all_of(student), student.source))
        names = {name: target + name for name in student.info}
    else:
        names = {name: target + original_student_name(name) for name in student.info}
    kept, removed, added = tables(teacher, student, names, replace)
    unknown = [n for n in kept if n.startswith("detector.") and not hf_names(n)]
    if unknown:
        notes.append(f"{len(unknown)} kept detector tensors have no counterpart in Sam3Model, such as {unknown[0]}")
    if student.config.image_size != host.image_size:
        notes.append(f"the student was trained at {student.config.image_size} pixels; sam3.pt readers default to 1008")
    report = MergeReport(
        str(student.source), str(path), str(out), "sam3.pt", kept, removed, added, as_json(student.config),
        tuple(notes),
    )  # fmt: skip
    return write_file(report, Joined(teacher, student, kept, names))


def _text_into_original(student: OpenedText, path: Path, out: Path, naming: str) -> MergeReport:
    """Write a ``sam3.pt`` with a text encoder under EfficientSAM3's names. Its trunk is the teacher's or a student."""
    teacher, trunk = open_original(path), merged_config(path)
    if naming == EFFICIENTSAM3 and trunk is not None and merged_trunk(teacher, path) is None:
        raise UserError(f"{path}: EfficientSAM3 has no such names as its trunk has; merge the trunk with --names too")
    _hosted(student, path)  # raises if it does not fit the heads
    tensors = write_text(student.config, all_of(student), student.source)
    student = OpenedText(student.source, student.config, tensors, {n: TensorInfo.of(t) for n, t in tensors.items()})
    names = {name: ORIGINAL_TEXT + name for name in tensors}
    kept, removed, added = tables(teacher, student, names, ORIGINAL_TEXT, vit=trunk is None)
    report = MergeReport(
        str(student.source), str(path), str(out), "sam3.pt", kept, removed, added,
        as_json(student.config if trunk is None else trunk),
    )  # fmt: skip
    return write_file(report, Joined(teacher, student, kept, names))


def _check_out(out: Path, into: Path, folder: bool) -> None:
    """Raise ``UserError`` if ``out`` cannot be replaced by a result, which is a ``folder`` or a file."""
    if out.resolve() == into.resolve():
        raise UserError(f"{out}: --out and --into are the same; the teacher is never overwritten")
    if folder and out.suffix in (*TORCH_SUFFIXES, ".safetensors"):
        raise UserError(f"{out}: the result is a folder; choose an --out without {out.suffix}")
    if not folder and out.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{out}: the result is a file; choose an --out that ends in .pt")
    if out.exists() and not sidecar(out).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists and is not the result of a merge; choose another --out, or remove it first")
    if out.exists() and out.is_dir() != folder:
        raise UserError(f"{out}: holds an earlier merge of the other layout; choose another --out, or remove it first")
