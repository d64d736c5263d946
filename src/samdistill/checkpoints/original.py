"""Loading of an original ``sam3.pt``, published or merged with a student, into transformers' classes.

The file holds a detector. The published one also holds a tracker on the same trunk. The file describes its architecture
only by the shapes of its tensors. This module supplies everything else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Sam3Config,
    Sam3LiteTextConfig,
    Sam3LiteTextModel,
    Sam3Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3TrackerVideoConfig,
    Sam3ViTConfig,
)

from ..reading import foreign
from ..students import StudentTrunkConfig
from ..types import UserError
from .efficientsam3 import merged_trunk, read_text, students_in
from .files import TORCH_SUFFIXES, TensorInfo, Weights, open_weights
from .layout import DETECTOR, HF_TRUNK, ORIGINAL_STUDENT, ORIGINAL_TRUNK, TRACKER, is_vit_tensor
from .loading import CONFIG, compare, open_config, pretrained
from .rename import to_hf
from .rename_tracker import to_tracker
from .report import merged_student, sidecar
from .student import as_json, expected, student_tensors
from .text import lite_config

Config = TypeVar("Config", Sam3Config, Sam3TrackerConfig, Sam3TrackerVideoConfig)
Model = TypeVar("Model", bound=PreTrainedModel)
Rename = Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], list[str]]]
LAYER_NORM_EPS = 1e-5
"""Epsilon of the layer norms in SAM 3's ViT in the original code. transformers' default is 1e-6."""
_DETECTOR_HEADS, _TRACKER_HEADS = f"{DETECTOR}transformer.", f"{TRACKER}sam_mask_decoder."


def original_parts(path: Path) -> set[type[PreTrainedConfig]]:
    """Return the parts of an original file by its tensor names.

    The result contains ``Sam3Config`` for a detector and ``Sam3TrackerConfig`` for a tracker. It is empty for any other
    file.
    """
    if not path.is_file() or path.suffix not in TORCH_SUFFIXES:
        return set()
    return _parts(open_original(path))


def open_original(path: Path) -> Weights:
    """Open an original file. A detector's names get the ``detector.`` that EfficientSAM3's training leaves out.

    Raises:
        UserError: As ``open_weights``.
    """
    weights = open_weights(path)
    bare = not any(name.startswith((DETECTOR, TRACKER)) for name in weights)
    if bare and any(name.startswith(ORIGINAL_TRUNK.removeprefix(DETECTOR)) for name in weights):
        info = {DETECTOR + name: about for name, about in weights.info.items()}
        return Weights(path, info, {}, {DETECTOR + name: weights[name] for name in weights}, weights.wrapped)
    return weights


def _parts(names: Iterable[str]) -> set[type[PreTrainedConfig]]:
    heads: dict[str, type[PreTrainedConfig]] = {_DETECTOR_HEADS: Sam3Config, _TRACKER_HEADS: Sam3TrackerConfig}
    return {kind for name in names for begin, kind in heads.items() if name.startswith(begin)}


def original_config(path: Path, kind: type[Config]) -> Config:
    """Return the configuration of the detector or the tracker in an original file.

    Sizes are those of a ``config.json`` beside the file, as on the hub, or else the published ones. The layer norms of
    SAM 3's ViT always get the original code's epsilon, because a ``config.json`` describes the weights in transformers'
    layout. The trunk of a merged file is its student, see ``merged_config``, with the student's input size.

    Args:
        path: The original or merged ``sam3.pt``.
        kind: Class of the configuration.

    Raises:
        UserError: The ``config.json`` is not that of a SAM 3, or cannot be read.
    """
    with foreign(path.parent / CONFIG, "not a readable configuration"):
        config = _beside(path.parent / CONFIG, kind)
        vision = config.vision_config
        if (student := merged_config(path)) is not None:
            vision.backbone_config = student
        elif isinstance(vision.backbone_config, Sam3ViTConfig):
            vision.backbone_config.layer_norm_eps = LAYER_NORM_EPS
        set_image_size(config, vision.backbone_config.image_size)
        if isinstance(config, Sam3TrackerConfig):
            read_levels_alone(config)
        return config


def merged_config(path: Path) -> StudentTrunkConfig | None:
    """Return the configuration of the student that is the trunk of a merged file, or None for a file with SAM 3's ViT.

    It is what the merge recorded beside the file. Without a record, it follows from EfficientSAM3's names.

    Raises:
        UserError: There is no record, and the names are not EfficientSAM3's, or those of an unknown trunk.
    """
    weights = open_original(path)
    if not any(name.startswith(ORIGINAL_STUDENT) for name in weights):
        return None
    published = None if sidecar(path).is_file() else merged_trunk(weights, path)
    return merged_student(path) if published is None else published[1]


def detector_config(path: Path) -> Sam3Config | Sam3LiteTextConfig:
    """Return the configuration of the detector in an original file, which may have a text encoder of EfficientSAM3.

    Raises:
        UserError: As ``original_config``, or the file holds students without a detector's heads.
    """
    weights = open_original(path)
    if Sam3Config not in _parts(weights) and (students := students_in(weights, path)):
        raise UserError(
            f"{path}: {students} without the heads of a SAM 3: `samdistill merge {path} --into TEACHER --out "
            "PATH` makes a model"
        )
    config, text = original_config(path, Sam3Config), read_text(weights, path)
    if text is None:
        return config
    return Sam3LiteTextConfig.from_dict(lite_config(as_json(config), text[0], path))


def read_levels_alone(config: Sam3TrackerConfig) -> None:
    """Remove the level of the neck that no head of the tracker reads.

    If it is present, transformers' ``Sam3TrackerModel`` adds the "no memory" embedding to that level and not to the
    level that the heads read. The original code and ``Sam3TrackerVideoModel`` remove the level before.
    """
    vision = config.vision_config
    vision.scale_factors = list(vision.scale_factors[: len(vision.backbone_feature_sizes)])


def set_image_size(config: PreTrainedConfig, side: int) -> None:
    """Set every size in ``config`` that follows from the input size.

    Args:
        config: Configuration of a SAM 3 detector or tracker. It is changed in place.
        side: Side of the square input in pixels.

    Raises:
        UserError: ``side`` is not a multiple of the patch size.
    """
    vision = config.vision_config
    trunk = vision.backbone_config
    grid, rest = divmod(side, trunk.patch_size)
    if rest:
        raise UserError(f"image size {side} is not a multiple of the patch size {trunk.patch_size}")
    trunk.image_size = side
    vision.backbone_feature_sizes = [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]
    if hasattr(config, "prompt_encoder_config"):
        config.prompt_encoder_config.image_size = side
    if hasattr(config, "memory_attention_rope_feat_sizes"):
        config.memory_attention_rope_feat_sizes = [grid, grid]


def _beside(about: Path, kind: type[Config]) -> Config:
    """Return a configuration of class ``kind`` with the sizes in a SAM 3's ``config.json``.

    If the file describes only the other part, its vision encoder is used, because detector and tracker share it.
    """
    if not about.is_file():
        return kind()
    whole = open_config(about.parent)
    trackers = (Sam3TrackerConfig, Sam3TrackerVideoConfig)
    detector = whole if isinstance(whole, Sam3Config) else getattr(whole, "detector_config", None)
    tracker = whole if isinstance(whole, trackers) else getattr(whole, "tracker_config", None)
    own, other = (detector, tracker) if kind is Sam3Config else (tracker, detector)
    if not isinstance(own or other, (Sam3Config, *trackers)):
        raise UserError(
            f"{about}: describes a {whole.model_type!r} model; beside an original sam3.pt it must describe a SAM 3, "
            "so replace or remove it"
        )
    if isinstance(own, kind):
        return own
    if own is not None:
        return as_tracker(own, kind)
    return kind(vision_config=other.vision_config.to_dict())


def as_tracker(video: PreTrainedConfig, kind: type[Config] = Sam3TrackerConfig) -> Config:
    """Convert a tracker's configuration for images to one for videos, or back.

    Fields that ``kind`` lacks are dropped. Fields that only ``kind`` has get the published values.
    """
    heads = {part: getattr(video, part).to_dict() for part in ("prompt_encoder_config", "mask_decoder_config")}
    for settings in heads.values():
        del settings["model_type"]  # the only field that differs between images and videos
    return kind(vision_config=video.vision_config.to_dict(), **heads)


def load_original(
    path: str | Path, kind: type[Model], config: PreTrainedConfig | None = None,
    student: StudentTrunkConfig | None = None, dtype: torch.dtype = torch.float32,
) -> Model:  # fmt: skip
    """Load a model from an original or merged ``sam3.pt``, in eval mode on the CPU.

    Args:
        path: The file.
        kind: ``Sam3Model``, ``Sam3LiteTextModel`` (a detector with a text encoder of EfficientSAM3),
            ``Sam3TrackerModel``, or ``Sam3TrackerVideoModel`` (the tracker with its memory).
        config: Configuration of the model. None uses ``original_config``, or ``detector_config`` for a
            ``Sam3LiteTextModel``. For a merged file its trunk is replaced.
        student: Configuration of the student in a merged file. None uses ``merged_config``.
        dtype: Type of the parameters.

    Raises:
        UserError: A tensor is missing or of another shape. For a merged file also: the student's tensors do not match
            its configuration, or tensors of the teacher's ViT remain.
    """
    path = Path(path)
    weights = open_original(path)
    small_text = issubclass(kind, Sam3LiteTextModel)
    _check_text(weights, kind, path)
    if config is None:
        config = detector_config(path) if small_text else original_config(path, kind.config_class)
    config = copy.deepcopy(config)
    rename: Rename = to_hf if small_text or issubclass(kind, Sam3Model) else to_tracker
    own = student if student is not None else merged_config(path)
    if own is not None and any(name.startswith(ORIGINAL_STUDENT) for name in weights):
        config.vision_config.backbone_config = own
        state = merged_state(weights, own, rename=rename)
    else:
        state, _ = rename(weights)
    copied = {name: tensor.clone() for name, tensor in state.items()}  # the file can be deleted afterwards
    return pretrained(kind, config, copied, path, dtype, spare=issubclass(kind, Sam3TrackerModel))


def _check_text(weights: Weights, kind: type[PreTrainedModel], path: Path) -> None:
    """Raise ``UserError`` if the file's text encoder is not the one that ``kind`` hosts."""
    if not issubclass(kind, Sam3LiteTextModel | Sam3Model):
        return
    wanted = Sam3Model if read_text(weights, path) is None else Sam3LiteTextModel
    if not issubclass(kind, wanted):
        encoder = "SAM 3's text encoder" if wanted is Sam3Model else "a text encoder of EfficientSAM3"
        raise UserError(f"{path}: holds {encoder}, which a {kind.__name__} cannot host; open it as a {wanted.__name__}")


def merged_state(
    state: Mapping[str, Tensor], student: StudentTrunkConfig, prefix: str = ORIGINAL_STUDENT, rename: Rename = to_hf,
) -> dict[str, Tensor]:  # fmt: skip
    """Rename the tensors of a merged ``sam3.pt`` for transformers' model whose trunk is ``student``.

    Args:
        state: Tensors of the file by their original names.
        student: Configuration of the student in the file.
        prefix: Prefix of the student's tensors in the file.
        rename: ``to_hf`` for the detector, ``to_tracker`` for the tracker. Tensors of the other part are left out.

    Raises:
        UserError: The student's tensors do not match its configuration, or tensors of the teacher's ViT remain.
    """
    own = student_tensors(state, prefix)
    found = {name: TensorInfo.of(state[there]) for name, there in own.items()}
    compare(found, expected(student), "merged sam3.pt", f"the student {student.backbone}")
    there = set(own.values())
    others = [name for name in state if name not in there]
    residue = [name for name in others if is_vit_tensor(name)]
    if residue:
        raise UserError(f"merged sam3.pt: {len(residue)} tensors of the teacher's ViT remain, such as {residue[0]}")
    renamed, _ = rename({name: state[name] for name in others})
    return renamed | {HF_TRUNK + name: state[at] for name, at in own.items()}
