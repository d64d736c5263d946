"""Image encoders of SAM (ViTDet) and SAM 2 (Hiera) as teachers, from folders, hub ids or original files."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, Sam2VisionConfig, Sam2VisionModel, SamVisionConfig, SamVisionModel

from ..checkpoints.loading import CONFIG, fill, parameter_count, skeleton
from ..checkpoints.sam import FINE_LEVELS, OpenedSam, fine_projection, open_sam, sam_config
from ..config import TeacherConfig
from ..ops.images import IMAGENET_MEAN, IMAGENET_STD
from ..types import ImageBatch, UserError
from .base import DTYPES, IMAGE_EMBEDDING, TEACHERS, OnlineTeacher, TeacherInfo, normalised
from .loading import fingerprint, freeze, square

FINE_LAYOUT = "(b, c, h, w): an FPN level after the mask decoder's projection, finer than the embedding"


class _SamEncoder(OnlineTeacher):
    """Common part of SAM and SAM 2: fixed input size, ImageNet statistics, and loading of the vision encoder."""

    kind: ClassVar[str]
    layout: ClassVar[str]
    config_class: ClassVar[type[PreTrainedConfig]]
    anchor: ClassVar[str]
    """Name of a tensor of the encoder. The part of a checkpoint's tensor name before it is the encoder's prefix."""
    behaviour: ClassVar[tuple[str, ...]]
    zero_padding: ClassVar[bool] = False
    """Whether padding is zero after normalisation, as in SAM's training."""
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, config: TeacherConfig, device: torch.device) -> None:
        vision = self._vision(config)
        self.image_size, self.embedding_shape = self._geometry(vision, config)
        self.device = device
        self.taps = {**dict.fromkeys(self._fine_shapes(config), FINE_LAYOUT), IMAGE_EMBEDDING: self.layout}
        encoder = skeleton(lambda: self._build(vision), config.path)
        opened = open_sam(config.path)
        self._load(encoder, opened)
        self._encoder = freeze(encoder, DTYPES[config.precision])
        self._projections = freeze(self._fine_projections(opened), DTYPES[config.precision])
        weights = nn.ModuleDict({"encoder": self._encoder, "projections": self._projections})
        self.fingerprint = fingerprint(
            weights if len(self._projections) else self._encoder, self._behaviour(vision), self.image_size, self.mean,
            self.std,
        )  # fmt: skip
        self._encoder.to(device)
        self._projections.to(device)

    @classmethod
    def describe(cls, config: TeacherConfig) -> TeacherInfo:
        vision = cls._vision(config)
        size, shape = cls._geometry(vision, config)
        params = parameter_count(skeleton(lambda: cls._build(vision), config.path))
        return TeacherInfo(
            cls.kind, config.path, size, shape, params, cls.mean, cls.std, cls.zero_padding, cls._fine_shapes(config)
        )

    @classmethod
    @abstractmethod
    def _build(cls, vision: Any) -> nn.Module: ...

    @classmethod
    @abstractmethod
    def _channels_and_stride(cls, vision: Any) -> tuple[int, int]: ...

    @classmethod
    def _fine_shapes(cls, config: TeacherConfig) -> dict[str, tuple[int, int, int]]:
        """Return the shapes of the fine levels by tap, finest first."""
        return {}

    @classmethod
    def _fine_projections(cls, opened: OpenedSam) -> nn.ModuleDict:
        """Return the mask decoder's projections of the fine levels."""
        return nn.ModuleDict()

    @classmethod
    def _behaviour(cls, vision: Any) -> dict[str, Any]:
        return {name: getattr(vision, name) for name in cls.behaviour}

    @classmethod
    def _size(cls, vision: Any, where: str) -> int:
        return square(vision.image_size, where)

    @classmethod
    def _vision(cls, config: TeacherConfig) -> Any:
        place, whole = sam_config(config.path, cls.kind)
        vision = getattr(whole, "vision_config", None) or whole
        if not isinstance(vision, cls.config_class):
            where = place / CONFIG if place.is_dir() else place
            if whole.model_type in cls.model_types:
                raise UserError(f"{where}: its image encoder is a {vision.model_type!r}; give a teacher with its own")
            raise UserError(f"{where}: a {whole.model_type!r} model, not one of kind {cls.kind!r}")
        return vision

    @classmethod
    def _geometry(cls, vision: Any, config: TeacherConfig) -> tuple[int, tuple[int, int, int]]:
        size = cls._size(vision, config.path)
        if config.image_size not in (None, size):
            raise UserError(
                f"teacher.image_size={config.image_size}: this {cls.kind} checkpoint has learned positions for "
                f"{size} pixels only; leave image_size out or set {size}"
            )
        channels, stride = cls._channels_and_stride(vision)
        return size, (channels, size // stride, size // stride)

    def _load(self, encoder: nn.Module, opened: OpenedSam) -> None:
        weights, place = opened.weights, opened.source
        prefixes = sorted({n.removesuffix(self.anchor) for n in weights if n.endswith(self.anchor)}, key=len)
        if not prefixes:
            raise UserError(f"{place}: wrong checkpoint: no tensors of a {self.kind} image encoder in it")
        prefix = prefixes[0]
        info = {name[len(prefix) :]: about for name, about in opened.info.items() if name.startswith(prefix)}
        fill(encoder, info, lambda name: weights[prefix + name], str(place))

    def _pixels(self, batch: ImageBatch) -> Tensor:
        dtype = next(self._encoder.parameters()).dtype
        return normalised(batch, self.mean, self.std, self.zero_padding).to(dtype)


@TEACHERS.register("sam")
class SamTeacher(_SamEncoder):
    """SAM's ViTDet with its neck. ``image_embedding`` is 256 x 64 x 64 at 1024 pixels.

    As in SAM's training, padding is zero after normalisation.
    """

    layout = "(b, 256, gh, gw): output of the vision encoder's neck, what the mask decoder reads"
    kind, config_class, anchor = "sam", SamVisionConfig, "patch_embed.projection.weight"
    model_types, zero_padding = ("sam",), True
    behaviour = ("num_attention_heads", "window_size", "global_attn_indexes", "hidden_act", "layer_norm_eps",
                 "use_rel_pos", "patch_size")  # fmt: skip

    @classmethod
    def _build(cls, vision: Any) -> nn.Module:
        return SamVisionModel(vision).vision_encoder

    @classmethod
    def _channels_and_stride(cls, vision: Any) -> tuple[int, int]:
        return vision.output_channels, vision.patch_size

    def _forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        return {IMAGE_EMBEDDING: self._encoder(self._pixels(batch)).last_hidden_state}


@TEACHERS.register("sam2")
class Sam2Teacher(_SamEncoder):
    """SAM 2's Hiera with its FPN. ``image_embedding`` is the coarsest level that the mask decoder reads.

    This is ``fpn_hidden_states[-1]`` with stride 16, 256 x 64 x 64 at 1024 pixels, before ``no_memory_embedding`` is
    added. ``high_resolution_0`` and ``high_resolution_1`` are the two finer levels as the mask decoder projects them:
    32 x 256 x 256 and 64 x 128 x 128. SAM 2 was trained on images resized to a square, with ImageNet statistics.
    """

    layout = "(b, 256, gh, gw): last FPN level (stride 16), before the no-memory embedding"
    kind, config_class, anchor = "sam2", Sam2VisionConfig, "backbone.patch_embed.projection.weight"
    model_types = ("sam2", "sam2_video")
    behaviour = ("fpn_top_down_levels", "num_feature_levels", "fpn_stride", "fpn_padding")
    trunk_behaviour: ClassVar[tuple[str, ...]] = (
        "num_attention_heads_per_stage", "window_size_per_stage", "global_attention_blocks", "query_stride",
        "num_query_pool_stages", "patch_stride", "patch_padding", "hidden_act", "layer_norm_eps", "blocks_per_stage",
    )  # fmt: skip

    @classmethod
    def _build(cls, vision: Any) -> nn.Module:
        return Sam2VisionModel(vision)

    @classmethod
    def _behaviour(cls, vision: Any) -> dict[str, Any]:
        trunk = vision.backbone_config
        return super()._behaviour(vision) | {name: getattr(trunk, name) for name in cls.trunk_behaviour}

    @classmethod
    def _size(cls, vision: Any, where: str) -> int:
        return square(vision.backbone_config.image_size, where)

    @classmethod
    def _channels_and_stride(cls, vision: Any) -> tuple[int, int]:
        # the neck lists levels from coarse to fine and keeps the last ones; the coarsest kept is the embedding
        trunk = vision.backbone_config
        level = vision.num_feature_levels - 1
        stride = square(trunk.patch_stride, "patch_stride") * square(trunk.query_stride, "query_stride") ** level
        return vision.fpn_hidden_size, stride

    @classmethod
    def _fine_shapes(cls, config: TeacherConfig) -> dict[str, tuple[int, int, int]]:
        _, whole = sam_config(config.path, cls.kind)
        if getattr(whole, "mask_decoder_config", None) is None:
            raise UserError(f"{config.path}: an image encoder alone; give a whole SAM 2, whose mask decoder is needed")
        width = whole.mask_decoder_config.hidden_size
        _, (_, grid, _) = cls._geometry(whole.vision_config, config)
        return {name: (width // (8 // 2**n), grid * 4 // 2**n, grid * 4 // 2**n) for n, name in enumerate(FINE_LEVELS)}

    @classmethod
    def _fine_projections(cls, opened: OpenedSam) -> nn.ModuleDict:
        found = nn.ModuleDict()
        for name, there in FINE_LEVELS.items():
            tensors = fine_projection(opened, there)
            channels, width = tensors["weight"].shape[:2]
            found[name] = nn.Conv2d(width, channels, 1)
            found[name].load_state_dict({key: tensor.clone() for key, tensor in tensors.items()}, assign=True)
        return found

    def _forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        *fine, embedding = self._encoder(self._pixels(batch)).fpn_hidden_states
        return {
            **{tap: conv(level) for (tap, conv), level in zip(self._projections.items(), fine, strict=True)},
            IMAGE_EMBEDDING: embedding,
        }
