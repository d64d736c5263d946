"""SAM 3's image trunk (its ViT, without necks, text encoder and heads) as a teacher.

It reads a Hugging Face folder or hub id of ``Sam3Model``, ``Sam3TrackerModel`` or ``Sam3VideoModel``, or the original
``sam3.pt``. Only the tensors of the trunk are read. The text encoder is not built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, Sam3Config, Sam3ViTConfig

from ..checkpoints.files import TORCH_SUFFIXES, TensorInfo, Weights, locate, open_weights
from ..checkpoints.layout import HF_TRUNK, ORIGINAL_TRUNK, VIT, vision_configs, vit_prefix
from ..checkpoints.loading import CONFIG, fill, locate_config, parameter_count, read_settings, skeleton
from ..checkpoints.original import original_config, original_parts
from ..checkpoints.rename import hf_names, to_hf
from ..config import TeacherConfig
from ..ops.images import SAM3_MEAN, SAM3_STD, normalise
from ..reading import foreign
from ..types import ImageBatch, UserError
from .base import DTYPES, IMAGE_EMBEDDING, TEACHERS, OnlineTeacher, TeacherInfo
from .loading import fingerprint, freeze, square

# settings that change the output but not the weights
_BEHAVIOUR = ("num_attention_heads", "window_size", "global_attn_indexes", "rope_parameters", "hidden_act",
              "layer_norm_eps", "patch_size", "layer_scale_init_value")  # fmt: skip


@TEACHERS.register("sam3")
class Sam3Teacher(OnlineTeacher):
    """The ViT of SAM 3. ``image_embedding`` is its output before any neck, 1024 x 72 x 72 at 1008 pixels."""

    model_types = ("sam3", "sam3_video", "sam3_tracker", "sam3_tracker_video", "sam3_lite_text")
    layout = "(b, c, gh, gw): last hidden state of the trunk, before the necks; stride 14"
    mean, std = SAM3_MEAN, SAM3_STD

    def __init__(self, config: TeacherConfig, device: torch.device) -> None:
        path, vit = _find(config.path)
        self.image_size, grid = _sized(vit, config)
        self.embedding_shape = (vit.hidden_size, grid, grid)
        self.device = device
        self.taps = {IMAGE_EMBEDDING: self.layout}
        trunk = skeleton(lambda: AutoModel.from_config(vit), config.path)
        _load(trunk, _download_weights(path, config.path))
        self._trunk = freeze(trunk, DTYPES[config.precision])
        self.fingerprint = trunk_fingerprint(self._trunk, self.image_size)
        self._trunk.to(device)

    @classmethod
    def describe(cls, config: TeacherConfig) -> TeacherInfo:
        _, vit = _find(config.path)
        size, grid = _sized(vit, config)
        params = parameter_count(skeleton(lambda: AutoModel.from_config(vit), config.path))
        return TeacherInfo("sam3", config.path, size, (vit.hidden_size, grid, grid), params, cls.mean, cls.std)

    def _forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        tokens = self._trunk(normalise(batch.images, self.mean, self.std)).last_hidden_state
        return {IMAGE_EMBEDDING: tokens.transpose(1, 2).unflatten(2, self.embedding_shape[1:])}


def trunk_fingerprint(trunk: nn.Module, image_size: int) -> str:
    """Return the fingerprint of a ``Sam3Teacher`` with this ViT.

    Args:
        trunk: The ViT on the CPU, in the precision of the teacher.
        image_size: Side of the teacher's input in pixels.
    """
    behaviour: dict[str, Any] = {name: getattr(trunk.config, name, None) for name in _BEHAVIOUR}
    return fingerprint(trunk, behaviour, image_size, Sam3Teacher.mean, Sam3Teacher.std)


def set_image_size(trunk: nn.Module, image_size: int) -> None:
    """Change the input size of a SAM 3 ViT in place. The result equals a ViT built with this size.

    Weights do not change: absolute position embeddings are tiled in every forward pass, and the rotary position ids are
    recomputed here.

    Args:
        trunk: The ViT.
        image_size: Side of the input in pixels, a multiple of the patch size.

    Raises:
        UserError: ``image_size`` is not a multiple of the patch size.
    """
    config = trunk.config
    check_image_size(image_size, config.patch_size)
    config.image_size = image_size
    for layer in trunk.layers:
        layer.position_ids = layer.precompute_positions(config, layer.window_size).to(layer.position_ids.device)


def check_image_size(image_size: int, patch_size: int = 14) -> None:
    """Check that an image size is a positive multiple of the patch size.

    Raises:
        UserError: It is not. The message gives the nearest sizes that are.
    """
    if image_size % patch_size == 0 and image_size > 0:
        return
    below, above = image_size // patch_size * patch_size, (image_size // patch_size + 1) * patch_size
    near = f"{below} or {above}" if below else str(above)
    raise UserError(f"teacher.image_size={image_size} is not a multiple of {patch_size}; the nearest that work: {near}")


def _sized(vit: PreTrainedConfig, config: TeacherConfig) -> tuple[int, int]:
    """Set the configured image size on ``vit``. Return it and the side of the token grid."""
    size = config.image_size if config.image_size is not None else square(vit.image_size, config.path)
    check_image_size(size, vit.patch_size)
    vit.image_size = size
    return size, size // vit.patch_size


def _find(path: str) -> tuple[Path, PreTrainedConfig]:
    """Return the folder or file of a checkpoint and the configuration of its ViT.

    For a file of tensors with transformers' names, the configuration is the ``config.json`` in the same folder, or the
    published architecture if there is none.
    """
    place = locate(path, ("config.json",))
    folder = place.parent if place.is_file() else place
    if original_parts(place):
        config: PreTrainedConfig = original_config(place, Sam3Config).vision_config.backbone_config
    elif place.is_file() and not (folder / "config.json").is_file():
        config = AutoConfig.for_model(VIT)
    else:
        _refuse_students(folder)
        _, config = locate_config(str(folder), "SAM 3")
        for step in ("detector_config", "vision_config", "backbone_config"):
            config = getattr(config, step, None) or config
    if not isinstance(config, Sam3ViTConfig):
        raise UserError(f"{place}: its trunk is a {config.model_type!r}, not SAM 3's ViT ({VIT!r})")
    return place, config


def _refuse_students(folder: Path) -> None:
    """Refuse a merged model before transformers fails on a configuration that needs the student's classes."""
    if not (folder / CONFIG).is_file():
        return
    with foreign(folder / CONFIG, "not a readable configuration"):
        trunk = (vision_configs(read_settings(folder))[0].get("backbone_config") or {}).get("model_type", VIT)
    if trunk != VIT:
        raise UserError(f"{folder / 'config.json'}: its trunk is a {trunk!r}, not SAM 3's ViT ({VIT!r})")


def _download_weights(place: Path, path: str) -> Path:
    """Return ``place``, or for a hub id the folder with the downloaded weights."""
    return place if place.is_file() or Path(path).expanduser().exists() else locate(path)


def _load(trunk: nn.Module, place: Path) -> None:
    weights = open_weights(place)
    if place.suffix in TORCH_SUFFIXES and any(name.startswith(ORIGINAL_TRUNK) for name in weights):
        _load_original(trunk, weights)
        return
    prefix = vit_prefix(weights)
    if prefix is None:
        raise UserError(f"{place}: wrong checkpoint: no tensors of SAM 3's image trunk in it")
    info = {name[len(prefix) :]: about for name, about in weights.info.items() if name.startswith(prefix)}
    fill(trunk, info, lambda name: weights[prefix + name], str(place))


def _load_original(trunk: nn.Module, weights: Weights) -> None:
    names = [name for name in weights if name.startswith(ORIGINAL_TRUNK) and hf_names(name)]
    renamed, _ = to_hf(weights, names)
    tensors = {name.removeprefix(HF_TRUNK): tensor for name, tensor in renamed.items()}
    fill(trunk, {k: TensorInfo.of(v) for k, v in tensors.items()}, tensors.__getitem__, str(weights.source))
