"""Reading a trained student: the folder ``save_pretrained`` wrote, a run that has one, or a checkpoint of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from ..reading import foreign
from ..students import EfficientSam3Config, EfficientSam3Model, StudentTrunk, StudentTrunkConfig
from ..students.memory import warm_start
from ..students.sam3 import MEMORY
from ..types import UserError
from .files import TORCH_SUFFIXES, TensorInfo, check_archive, load_torch, open_weights
from .layout import ORIGINAL_STUDENT, STUDENT
from .loading import build_config, compare, model_kinds, open_config, pretrained, read_settings

_ORIGINAL_BACKBONE, _BACKBONE = "backbone.model.", "backbone."


@dataclass(frozen=True)
class Host:
    """What a teacher's heads ask of the trunk they sit on. image_size is that of the teacher's own inputs."""

    hidden_size: int
    patch_size: int
    image_size: int


@dataclass(frozen=True)
class Student:
    """A student's configuration and its tensors by their own names."""

    source: Path
    config: StudentTrunkConfig
    weights: Mapping[str, Tensor]
    info: dict[str, TensorInfo]


def read_student(source: Path, host: Host) -> Student:
    """The student in ``source``, complete and of the shapes its configuration asks for, or ``UserError``.

    source: a folder with ``config.json`` and ``model.safetensors``; a run folder with such a folder ``student/``; or a
    ``ckpt_epoch_{n}.pt``, whose averaged weights are taken where it has them and whose geometry is the ``host``'s.
    """
    if source.is_file() and source.suffix in TORCH_SUFFIXES:
        student = _from_checkpoint(source, host)
    elif source.is_file() and (source.parent / "config.json").is_file():
        student = _from_folder(source.parent)
    elif source.is_dir():
        student = _from_folder(source if (source / "config.json").is_file() else _in_run(source))
    else:
        raise UserError(f"{source}: no student here: give a run folder, its student/ folder or a ckpt_epoch_*.pt")
    with foreign(student.source, "no student can be built from its configuration"):
        wanted = expected(student.config)
    compare(student.info, wanted, str(student.source), f"the student {student.config.backbone}")
    return student


def expected(config: StudentTrunkConfig) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of a student's tensors, found without memory for them."""
    with torch.device("meta"):
        return {name: TensorInfo.of(tensor) for name, tensor in StudentTrunk(config).state_dict().items()}


def original_student_name(name: str) -> str:
    """A student's tensor under the published prefix of ``sam3.pt``: timm's keys gain ``model.``, the head's do not."""
    return _ORIGINAL_BACKBONE + name.removeprefix(_BACKBONE) if name.startswith(_BACKBONE) else name


def student_name(original: str) -> str:
    """The inverse of ``original_student_name``."""
    if original.startswith(_ORIGINAL_BACKBONE):
        return _BACKBONE + original.removeprefix(_ORIGINAL_BACKBONE)
    return original


def student_tensors(state: Mapping[str, Tensor], prefix: str = ORIGINAL_STUDENT) -> dict[str, str]:
    """In a merged ``sam3.pt``: the student's own name of each of its tensors, to the name it has there."""
    return {student_name(name.removeprefix(prefix)): name for name in state if name.startswith(prefix)}


def _in_run(run: Path) -> Path:
    if (run / "student" / "config.json").is_file():
        return run / "student"
    checkpoints = sorted(run.glob("ckpt_epoch_*.pt"), key=lambda p: p.stat().st_mtime)
    if checkpoints:
        raise UserError(f"{run}: this run has not finished (no student/); train on, or merge {checkpoints[-1]}")
    raise UserError(f"{run}: not a run with a student (no student/ and no config.json in it)")


def _from_folder(folder: Path) -> Student:
    raw = read_settings(folder)
    if raw.get("model_type") != STUDENT:
        raise UserError(f"{folder}: not a student but a {raw.get('model_type')!r} model; give the run that trained one")
    weights = open_weights(folder)
    return Student(folder, open_config(folder, StudentTrunkConfig), weights, weights.info)


def _from_checkpoint(path: Path, host: Host) -> Student:
    content = load_torch(path)  # which says most about a file that is no checkpoint
    check_archive(path)
    model, text = content.get("model"), content.get("config")
    if not isinstance(model, dict) or not isinstance(text, str):
        raise UserError(f"{path}: not a checkpoint of a training run (no 'model' and 'config' in it)")
    with foreign(path, "its 'config' is not that of a samdistill run"):
        run: dict[str, Any] = yaml.safe_load(text)
        size = run["teacher"].get("image_size") or host.image_size
        raw: dict[str, Any] = {key: run["student"][key] for key in ("backbone", "head")}
    raw |= {"hidden_size": host.hidden_size, "patch_size": host.patch_size, "image_size": size}
    config = build_config(StudentTrunkConfig, raw, path)
    with foreign(path, "its 'model' or 'ema' is no table of tensors"):
        weights: dict[str, Tensor] = {**model, **(content.get("ema") or {})}
        return Student(path, config, weights, {name: TensorInfo.of(tensor) for name, tensor in weights.items()})


def as_json(config: StudentTrunkConfig) -> dict[str, Any]:
    """A configuration as its ``config.json`` holds it."""
    return json.loads(config.to_json_string(use_diff=False))


def start_from(model: PreTrainedModel, folder: Path) -> None:
    """Give ``model`` all the weights of the same student in ``folder``, or in a run that has it in ``student/``.

    Raises ``UserError`` for a folder without one, for another kind of model, and where names or shapes differ.
    """
    kind = model.config.model_type
    place = next((found for found, name in model_kinds(folder).items() if name == kind), None)
    if place is None:
        raise UserError(f"{folder}: no student of kind {kind} here; give the run that trained one, or its student/")
    weights, state = open_weights(place), model.state_dict()
    compare(weights.info, {name: TensorInfo.of(t) for name, t in state.items()}, str(place), "this student")
    model.load_state_dict({name: weights[name] for name in state})


def trunk_weights(folder: Path, backbone: str) -> Path:
    """The weights of the trunk in a run or in its own folder, once its configuration names the same backbone."""
    found = {place: name for place, name in model_kinds(folder).items() if (place / "model.safetensors").is_file()}
    if not found:
        raise UserError(f"{folder}: no trained trunk here; give the run of an encoder job, or its student/ folder")
    place, name = next(iter(found.items()))
    if name != STUDENT:
        raise UserError(f"{place}: not a trunk but a {name!r} model; give the run of an encoder job")
    own = open_config(place, StudentTrunkConfig).backbone
    if own != backbone:
        raise UserError(f"{place}: a trunk of {own!r}, but this student is built on {backbone!r}")
    return place / "model.safetensors"


def load_with_memory(folder: Path, latents: int = 64, layers: int = 2, windows: int = 0) -> EfficientSam3Model:
    """A student of images with new memory modules, as ``warm_start`` has them; everything else is what it was.

    Raises ``UserError`` for a student that has a memory, and where anything but the memory is missing or left over.
    """
    config = open_config(folder, EfficientSam3Config)
    if config.memory_latents:
        raise UserError(f"{folder}: has a memory already")
    config.memory_latents, config.memory_layers, config.memory_windows = latents, layers, windows
    model = pretrained(EfficientSam3Model, config, folder, folder, new=MEMORY)
    assert model.memory_resampler is not None and model.memory_attention is not None
    warm_start(model.memory_resampler, model.memory_attention)
    return model
