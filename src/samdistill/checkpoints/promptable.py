"""Loading of promptable models (SAM 3 tracker, SAM, SAM 2, MobileSAM), complete, in float32 and eval mode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Sam2Config,
    Sam2Model,
    Sam2VideoConfig,
    Sam3Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3TrackerVideoConfig,
    SamConfig,
    SamModel,
)

from ..ops.promptable import Promptable
from ..reading import foreign
from ..students import HostedSamConfig, HostedSamModel, MobileSamConfig, MobileSamModel
from ..types import UserError
from .efficientsam3 import students_in
from .exported import PROMPTABLE, exported_kind, open_exported
from .files import TORCH_SUFFIXES, locate, open_weights
from .layout import STUDENT_TRUNK
from .loading import CONFIG, build_config, model_kinds, open_config, pretrained, read_settings
from .original import as_tracker, load_original, original_config, original_parts, read_levels_alone, set_image_size
from .rename_sam import MOBILE
from .rename_sam2 import SAM2
from .sam import open_sam, original_kind, renamed

# The published repository of SAM 3 has the model type sam3_video and contains the tracker.
_KINDS: dict[str, type[PreTrainedModel]] = {
    "sam3_tracker": Sam3TrackerModel, "sam3_tracker_video": Sam3TrackerModel, "sam3_video": Sam3TrackerModel,
    "sam3": Sam3Model, "sam": SamModel,
    "sam2": Sam2Model, SAM2: Sam2Model, HostedSamConfig.model_type: HostedSamModel,
    MobileSamConfig.model_type: MobileSamModel,
}  # fmt: skip
_PARTS = (Sam3TrackerModel, Sam2Model)
"""Classes whose checkpoints may hold a memory or a detector too."""
_SOURCES = (
    "a Hugging Face folder of a SAM 3 tracker, a SAM, a SAM 2 or a MobileSAM, a run with one in student/ or merged/, "
    "or an original sam3.pt, sam_vit_*.pth, sam2*_hiera_*.pt, mobile_sam.pt or edge_sam.pth"
)


def load_promptable(path: str | Path, image_size: int | None = None) -> Promptable:
    """Load a model that predicts masks from points and boxes, in float32 and eval mode on the CPU.

    Folders are read from safetensors only. Torch files are read without running code from them.

    Args:
        path: One of:

            - a Hugging Face folder or a hub id of a SAM 3 tracker, a SAM or a SAM 2 (each with its own or a distilled
              trunk), or a MobileSAM;
            - a run with such a folder in ``student/`` or ``merged/``;
            - an original ``sam3.pt`` (also with a student merged in), ``sam_vit_*.pth``, ``sam2*_hiera_*.pt``,
              ``mobile_sam.pt`` or ``edge_sam.pth``;
            - a folder that ``samdistill export`` wrote;
            - ``sandbox``, ``sandbox-sam`` or ``sandbox-mobile``, the packaged models.
        image_size: Side of the square input in pixels. None keeps the checkpoint's. A SAM supports only its own.

    Raises:
        UserError: The checkpoint is missing, incomplete or of another kind, or does not support ``image_size``.

    Example:
        >>> model = load_promptable("sandbox-mobile")
    """
    model = load_model(path, image_size)
    if isinstance(model, Sam3Model):
        raise UserError(
            f"{path}: a {type(model).__name__} has no prompt decoder; masks from boxes and points need {_SOURCES} "
            "(`samdistill merge RUN --into TRACKER_FOLDER` makes one)"
        )
    return model


def load_model(path: str | Path, image_size: int | None = None) -> Promptable | Sam3Model:
    """Load what ``load_promptable`` loads, or a ``Sam3Model`` from a detector's folder or a file without a tracker."""
    place = locate(path)
    if place.is_file():
        return _original(place, image_size)
    if exported_kind(place) is not None:
        return open_exported(place, PROMPTABLE, image_size)
    found = model_kinds(place)
    for folder, name in found.items():
        if (kind := _KINDS.get(name or "")) is not None:
            return pretrained(kind, _sized(kind, folder, image_size), folder, folder, spare=kind in _PARTS)
    if STUDENT_TRUNK in found.values():
        raise UserError(
            f"{path}: a distilled trunk without a prompt decoder: `samdistill merge {path} --into TRACKER_FOLDER` "
            "makes a model that answers prompts"
        )
    said = f"holds {', '.join(repr(name) for name in found.values())}" if found else "has no config.json"
    raise UserError(f"{path}: {said}, so this is not a promptable model; give {_SOURCES}")


def _sized(kind: type[PreTrainedModel], folder: Path, image_size: int | None) -> PreTrainedConfig:
    """Return the folder's configuration for inputs of ``image_size``."""
    if kind is MobileSamModel:
        sized = {} if image_size is None else {"image_size": image_size}
        return build_config(MobileSamConfig, {**read_settings(folder), **sized}, folder / CONFIG)
    config = open_config(folder)  # may be that of a video model
    if isinstance(config, SamConfig | Sam2Config | Sam2VideoConfig):
        _same_size(config.prompt_encoder_config.image_size, image_size, folder)
        return image_config(config)
    with foreign(folder / CONFIG, "not a readable configuration"):
        return _sized_sam3(config, image_size)


def image_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of a SAM 2 for images, of that for images or videos. Others are returned unchanged."""
    if not isinstance(config, Sam2VideoConfig):
        return config
    parts = {part: getattr(config, part).to_dict() for part in ("prompt_encoder_config", "mask_decoder_config")}
    for settings in parts.values():
        del settings["model_type"]  # the only field that differs between images and videos
    return Sam2Config(vision_config=config.vision_config.to_dict(), **parts)


def _sized_sam3(config: PreTrainedConfig, image_size: int | None) -> PreTrainedConfig:
    """Return a SAM 3's configuration with every size that follows from the input set for ``image_size``."""
    if hasattr(config, "tracker_config"):
        config = config.tracker_config  # a video checkpoint contains the tracker's configuration
    if isinstance(config, Sam3TrackerVideoConfig):
        config = as_tracker(config)
    if isinstance(config, Sam3TrackerConfig):
        read_levels_alone(config)
    if image_size not in (None, config.vision_config.backbone_config.image_size):
        set_image_size(config, image_size)
    return config


def _same_size(own: int, image_size: int | None, where: Path) -> None:
    if image_size not in (None, own):
        raise UserError(
            f"{where}: this SAM has learned positions for {own} px and cannot read images of {image_size} px; leave "
            f"image_size out or set {own}"
        )


def prompted_alone(path: Path) -> bool:
    """Whether an original file has a prompt decoder and no concept detector, by its tensor names."""
    if parts := original_parts(path):
        return parts == {Sam3TrackerConfig}
    return path.suffix in TORCH_SUFFIXES and original_kind(open_weights(path)) is not None


def _original(path: Path, image_size: int | None) -> Promptable | Sam3Model:
    """Load a SAM 3 (its tracker, if it has one), a SAM or a MobileSAM from a file with original names."""
    if parts := original_parts(path):
        sam3 = Sam3TrackerModel if Sam3TrackerConfig in parts else Sam3Model
        return load_original(path, sam3, _sized_sam3(original_config(path, sam3.config_class), image_size))
    weights = open_weights(path)
    kind = original_kind(weights)
    if kind is None and (students := students_in(weights, path)):
        raise UserError(
            f"{path}: {students} without a prompt decoder: `samdistill merge {path} --into SAM3` makes a model"
        )
    if kind is None:
        raise UserError(
            f"{path}: not an original SAM, MobileSAM, EdgeSAM, SAM 2 or SAM 3, by its tensor names; give {_SOURCES}"
        )
    if kind in MOBILE:
        # The trunk has no position embeddings, so any multiple of the patch size is valid.
        sized = MobileSamConfig(**MOBILE[kind], **({} if image_size is None else {"image_size": image_size}))
        return pretrained(MobileSamModel, sized, _copied(renamed(weights)), path)
    opened = open_sam(path)
    _same_size(opened.config.prompt_encoder_config.image_size, image_size, path)
    if kind == SAM2:
        return pretrained(Sam2Model, image_config(opened.config), _copied(opened.weights), path, spare=True)
    return pretrained(SamModel, opened.config, _copied(opened.weights), path)


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors out of a file, which can be deleted afterwards."""
    return {name: tensor.clone() for name, tensor in state.items()}
