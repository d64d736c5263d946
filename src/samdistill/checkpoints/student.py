"""Reading of a trained student from its folder, from a run that contains one, or from a run's checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..ops.images import SAM3_MEAN, SAM3_STD, Statistics
from ..reading import foreign
from ..students import FROM_IMAGES, MEMORY, VIDEO_DETECTORS, StudentTrunk, StudentTrunkConfig, VideoDetector
from ..students.backbones import statistics
from ..students.memory import warm_start
from ..types import UserError
from .efficientsam3 import merged_trunk, own_names, read_trunk
from .files import (
    STUDENT_FOLDER,
    TORCH_SUFFIXES,
    TensorInfo,
    check_archive,
    load_torch,
    named_tensors,
    open_weights,
)
from .layout import ORIGINAL_STUDENT, STUDENT_TRUNK
from .loading import CONFIG, build_config, compare, model_kinds, open_config, pretrained, read_settings
from .rename_efficientsam3 import TRUNKS

_ORIGINAL_BACKBONE, _BACKBONE = "backbone.model.", "backbone."


@dataclass(frozen=True)
class Host:
    """Properties of the trunk that a teacher's heads expect.

    Attributes:
        hidden_size: Channels of the trunk's output.
        patch_size: Pixels per cell of the trunk's output.
        image_size: Side of the teacher's own square input in pixels.
        fine_channels: Channels of the levels that are finer than the trunk's output, finest first.
        mean, std: The teacher's normalisation, in the range 0..1.
    """

    hidden_size: int
    patch_size: int
    image_size: int
    fine_channels: tuple[int, ...] = ()
    mean: Statistics = SAM3_MEAN
    std: Statistics = SAM3_STD


@dataclass(frozen=True)
class OpenedStudent:
    """Configuration and tensors of a student's trunk, by the trunk's own names."""

    source: Path
    config: StudentTrunkConfig
    weights: Mapping[str, Tensor]
    info: dict[str, TensorInfo]

    @classmethod
    def of(cls, source: Path, config: StudentTrunkConfig, weights: Mapping[str, Tensor]) -> OpenedStudent:
        """Return a student whose tensors are open."""
        return cls(source, config, weights, {name: TensorInfo.of(tensor) for name, tensor in weights.items()})


def read_student(source: Path, host: Host) -> OpenedStudent:
    """Read a student and check that it is complete and has the shapes of its configuration.

    Args:
        source: A folder with ``config.json`` and weights, or a file in one; a run folder with such a folder
            ``student/``; a ``ckpt_epoch_{n}.pt``, whose averaged weights are used where it has them; or a file of
            EfficientSAM3, of its first stage or merged. Sizes and normalisation of a checkpoint or a file are the
            ``host``'s.
        host: Properties of the teacher that the student goes into.

    Raises:
        UserError: There is no student in ``source``, or it is damaged, incomplete or of other shapes.
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
    """Return names, shapes and dtypes of a student's tensors, without allocating memory for them."""
    with torch.device("meta"):
        return {name: TensorInfo.of(tensor) for name, tensor in StudentTrunk(config).state_dict().items()}


def original_student_name(name: str) -> str:
    """Return the name of a student's tensor under the published prefix of ``sam3.pt``.

    Names of the timm backbone get ``model.``. Names of the head do not change.
    """
    return _ORIGINAL_BACKBONE + name.removeprefix(_BACKBONE) if name.startswith(_BACKBONE) else name


def student_name(original: str) -> str:
    """Inverse of ``original_student_name``."""
    if original.startswith(_ORIGINAL_BACKBONE):
        return _BACKBONE + original.removeprefix(_ORIGINAL_BACKBONE)
    return original


def student_tensors(state: Mapping[str, Tensor], prefix: str = ORIGINAL_STUDENT) -> dict[str, str]:
    """Return the student's tensors in a merged ``sam3.pt``: the student's own name to the name in the file.

    The student has EfficientSAM3's names or ours. A name that is neither is kept.

    Raises:
        UserError: The student has an unknown trunk of EfficientSAM3.
    """
    own = own_names((name for name in state if name.startswith(prefix)), (prefix,))
    published = merged_trunk(state, "merged sam3.pt")
    name_of = student_name if published is None else published[0].our_name
    return {name_of(name) or name: there for name, there in own.items()}


def _in_run(run: Path) -> Path:
    if (run / STUDENT_FOLDER / "config.json").is_file():
        return run / STUDENT_FOLDER
    checkpoints = sorted(run.glob("ckpt_epoch_*.pt"), key=lambda p: p.stat().st_mtime)
    if checkpoints:
        raise UserError(f"{run}: this run has not finished (no student/); train on, or merge {checkpoints[-1]}")
    raise UserError(f"{run}: not a run with a student (no student/ and no config.json in it)")


def _from_folder(folder: Path) -> OpenedStudent:
    raw = read_settings(folder)
    if raw.get("model_type") != STUDENT_TRUNK:
        raise UserError(f"{folder}: not a student but a {raw.get('model_type')!r} model; give a run that trained one")
    weights = open_weights(folder)
    return OpenedStudent(folder, open_config(folder, StudentTrunkConfig), weights, weights.info)


def _from_checkpoint(path: Path, host: Host) -> OpenedStudent:
    content = load_torch(path)  # first, since its errors describe a file that is not a checkpoint best
    check_archive(path)
    model, text = content.get("model"), content.get("config")
    if not isinstance(text, str) and (published := _published(path, named_tensors(content)[1], host)) is not None:
        return published
    if not isinstance(model, dict) or not isinstance(text, str):
        raise UserError(f"{path}: not a checkpoint of a training run (no 'model' and 'config' in it)")
    with foreign(path, "its 'config' is not that of a samdistill run"):
        run: dict[str, Any] = yaml.safe_load(text)
        size = run["teacher"].get("image_size") or host.image_size
        raw: dict[str, Any] = {key: run["student"][key] for key in ("backbone", "head")}
        raw["geometry"] = run.get("data", {}).get("geometry", "square")
        if run["student"].get("host_statistics"):
            raw |= {"input_mean": list(host.mean), "input_std": list(host.std)}
    raw |= {
        "hidden_size": host.hidden_size, "patch_size": host.patch_size, "image_size": size,
        "fine_channels": list(host.fine_channels), "host_mean": list(host.mean), "host_std": list(host.std),
    }  # fmt: skip
    config = build_config(StudentTrunkConfig, raw, path)
    with foreign(path, "its 'model' or 'ema' is no table of tensors"):
        weights: dict[str, Tensor] = {**model, **(content.get("ema") or {})}
        return OpenedStudent.of(path, config, weights)


def _published(path: Path, state: Mapping[str, Tensor], host: Host) -> OpenedStudent | None:
    """Read the trunk of a file of EfficientSAM3. None if the file has none.

    Raises:
        UserError: As ``read_trunk``, or the trunk belongs to no known family.
    """
    found = read_trunk(state, path, host.patch_size, host.image_size)
    if found is not None:
        return OpenedStudent.of(path, *found)
    if strange := next((name for name in state if name.startswith(_ORIGINAL_BACKBONE)), None):
        raise UserError(
            f"{path}: an unknown trunk, with names such as {strange}; EfficientSAM3's are {', '.join(TRUNKS)}"
        )
    return None


def as_json(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the contents of a configuration's ``config.json``."""
    return json.loads(config.to_json_string(use_diff=False))


def start_from(model: PreTrainedModel, folder: Path) -> None:
    """Load all weights of ``model`` from a student of the same kind, and the normalisation of a hosted trunk.

    Args:
        model: The model to fill.
        folder: A student's folder, or a run with one in ``student/`` or ``merged/``.

    Raises:
        UserError: The folder has no model of this kind, or names or shapes differ.
    """
    kind = model.config.model_type
    place = next((found for found, name in model_kinds(folder).items() if name == kind), None)
    if place is None:
        raise UserError(f"{folder}: no student of kind {kind} here; give the run that trained one, or its student/")
    weights, state = open_weights(place), model.state_dict()
    compare(weights.info, {name: TensorInfo.of(t) for name, t in state.items()}, str(place), "this student")
    model.load_state_dict({name: weights[name] for name in state})
    trunk = getattr(getattr(model, "vision_encoder", None), "backbone", None)
    if isinstance(trunk, StudentTrunk):
        trunk.read_as(open_config(place).vision_config.backbone_config)


def trunk_backbone(source: Path, backbone: str) -> dict[str, Tensor]:
    """Return the backbone of a trained trunk, by its timm names.

    Args:
        source: As in ``read_student``.
        backbone: timm name of the backbone that the trunk has to have.

    Raises:
        UserError: As in ``read_student``, or the trunk has another backbone, or reads images that are not normalised
            with timm's statistics of the backbone.
    """
    found = read_student(source, Host(1024, 14, 1008))  # SAM 3's; only the head depends on it
    if found.config.backbone != backbone:
        raise UserError(
            f"{found.source}: a trunk with the backbone {found.config.backbone!r}, but this student has {backbone!r}"
        )
    if (found.config.input_mean, found.config.input_std) != tuple(map(list, statistics(backbone))):
        raise UserError(
            f"{found.source}: a trunk that reads images normalised with the mean {found.config.input_mean}, but this "
            f"student has timm's {list(statistics(backbone)[0])}; only a hosted student takes both"
        )
    return {n.removeprefix(_BACKBONE): found.weights[n] for n in found.info if n.startswith(_BACKBONE)}


def video_config(folder: Path) -> Any:
    """Return the configuration of an image student, as that of a video student.

    Args:
        folder: Folder of a student of the detection job: an ``EfficientSam3Model``, or a ``Sam3Model`` or
            ``Sam3LiteTextModel`` with a distilled trunk.

    Raises:
        UserError: The folder has another model, or one with a memory.
    """
    settings = read_settings(folder)
    kind = settings.get("model_type")
    trunk = ((settings.get("vision_config") or {}).get("backbone_config") or {}).get("model_type")
    if kind in VIDEO_DETECTORS and settings.get("memory_latents"):
        raise UserError(f"{folder}: already has a memory; give a student of the detection job")
    if kind not in FROM_IMAGES or (kind not in VIDEO_DETECTORS and trunk != STUDENT_TRUNK):
        raise UserError(f"{folder}: holds a {kind!r} model, no student of the detection job")
    wanted = VIDEO_DETECTORS[FROM_IMAGES[kind]].config_class
    return build_config(wanted, {**settings, "model_type": wanted.model_type}, folder / CONFIG)


def load_with_memory(folder: Path, latents: int = 64, layers: int = 2, windows: int = 0) -> VideoDetector:
    """Load an image student and add newly initialised memory modules (see ``warm_start``).

    All other weights and settings are unchanged.

    Args:
        folder: Folder of an image student, see ``video_config``.
        latents: Number of memory tokens.
        layers: Number of layers of the resampler.
        windows: Side of the grid of latents that attend to one window each; 0 for none.

    Raises:
        UserError: As ``video_config``, or tensors other than the memory's are missing or left over.
    """
    config = video_config(folder)
    config.memory_latents, config.memory_layers, config.memory_windows = latents, layers, windows
    model = pretrained(VIDEO_DETECTORS[config.model_type], config, folder, folder, new=MEMORY)
    assert model.memory_resampler is not None and model.memory_attention is not None
    warm_start(model.memory_resampler, model.memory_attention)
    return model
