"""The student's trunk as a Hugging Face model, which replaces the ViT in SAM 3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..types import UserError
from .backbones import (
    STUDENTS,
    build_backbone,
    check_runs,
    feature_maps,
    levels,
    load_backbone,
    resolve_backbone,
    statistics,
)
from .heads import HEADS, FusedHead


@strict
class StudentTrunkConfig(PreTrainedConfig):
    """Configuration of a ``StudentTrunk``: a timm backbone and a head that predicts SAM 3's image embedding.

    Args:
        hidden_size: Channels of the embedding (the teacher's).
        patch_size: Pixels per cell of the embedding.
        image_size: Side of the square input in pixels. Other multiples of ``patch_size`` work unless the backbone has a
            fixed size.
        backbone: A student's name or a timm name. It is stored as the timm name.
        head: A name in ``HEADS``.
        host_mean, host_std: Normalisation of ``pixel_values`` (SAM 3's 0.5).
        input_mean, input_std: Normalisation that the backbone expects. None uses timm's values. The trunk converts from
            the host's normalisation to this one.
        geometry: Placement of the training images on the canvas, ``square`` or ``longest_side``.
        fine_channels: Channels of the levels that are finer than the embedding, finest first. Each level has twice the
            resolution of the next one, the last of them twice that of the embedding. SAM 2 has two, other hosts none.
        attention_eps: Epsilon in the denominators of EfficientViT's linear attention. None uses timm's, 1e-5; the
            original code, and so EfficientSAM3's, has 1e-15, with which half precision may divide by zero.

    Raises:
        UserError: The backbone or the head is unknown, or ``image_size`` is not a multiple of ``patch_size``.

    Example:
        >>> samdistill.StudentTrunkConfig(backbone="es_rv_m").backbone
        'repvit_m1_1'
    """

    model_type = "samdistill_student_trunk"
    base_config_key = "backbone_config"

    hidden_size: int = 1024
    patch_size: int = 14
    image_size: int = 1008
    backbone: str = "repvit_m1_1"
    head: str = "fused"
    host_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    host_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    input_mean: list[float] | tuple[float, ...] | None = None
    input_std: list[float] | tuple[float, ...] | None = None
    geometry: str = "square"
    fine_channels: list[int] | tuple[int, ...] = ()
    attention_eps: float | None = None

    def __post_init__(self, **kwargs) -> None:
        self.backbone = resolve_backbone(self.backbone)
        HEADS.get(self.head)
        grid_of((self.image_size, self.image_size), self.patch_size)
        mean, std = statistics(self.backbone)
        self.host_mean, self.host_std = list(self.host_mean), list(self.host_std)
        self.fine_channels = list(self.fine_channels)
        self.input_mean = list(mean if self.input_mean is None else self.input_mean)
        self.input_std = list(std if self.input_std is None else self.input_std)
        super().__post_init__(**kwargs)


def built(given: Any, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return a sub-configuration from its fields. transformers' own way to do this changed between 5.17 and 5.24."""
    return given if isinstance(given, PreTrainedConfig) else kind(**(given or {}))


class TimmModel(PreTrainedModel):
    """Base class of Hugging Face models around a timm backbone. It keeps the initialisation of timm and torch."""

    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True  # timm dispatches attention itself

    def post_init(self) -> None:
        self._awaits_weights = any(p.is_meta for p in self.parameters())
        super().post_init()

    def get_input_embeddings(self) -> None:  # called by hosts; images have no token embeddings
        return None

    def computed(self) -> dict[str, Tensor]:
        """Return the buffers that follow from the configuration, by name. They are not saved."""
        return {}

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        self._init_weights(module)  # transformers' own method skips a module without tensors of its own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Keep the initialisation of timm and torch, and complete what ``from_pretrained`` could not load.

        ``from_pretrained`` builds on the meta device and allocates uninitialised memory for everything that the file
        lacks: non-persistent buffers (TinyViT's attention indices) and missing weights. Both are copied from a newly
        built model, so the result equals that of the constructor.
        """
        if module is not self or not self._awaits_weights:
            return
        wanted = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        blank = {name: tensor for name, tensor in wanted.items() if not getattr(tensor, "_is_hf_initialized", False)}
        for name, value in self.computed().items():
            blank.pop(name).copy_(value)
        self._awaits_weights = False
        if not blank:
            return
        with torch.device("cpu"):
            twin = type(self)(self.config)
        fresh = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
        for name, tensor in blank.items():
            tensor.copy_(fresh[name])


@dataclass
class TrunkOutput(BaseModelOutput):
    """Output of a ``StudentTrunk``.

    Attributes:
        last_hidden_state: The embedding as tokens in row-major order, (b, gh * gw, hidden_size).
        fine_levels: The finer levels as grids, finest first. None for a trunk without any.
    """

    fine_levels: tuple[Float[Tensor, "b _ _ _"], ...] | None = None


class StudentTrunk(TimmModel):
    """Trunk of a student: timm backbone, head and conversion of the host's normalisation.

    Example:
        >>> trunk = samdistill.StudentTrunk(samdistill.StudentTrunkConfig(backbone="es_rv_m", image_size=126))
        >>> trunk.eval()(torch.zeros(1, 3, 126, 126)).last_hidden_state.shape  # 9 x 9 cells of 14 pixels
        torch.Size([1, 81, 1024])
    """

    config_class = StudentTrunkConfig
    config: StudentTrunkConfig

    def __init__(self, config: StudentTrunkConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone, config.image_size)
        self.levels = levels(self.backbone)
        self._set_eps()
        channels = [level.channels for level in self.levels]
        self.head = HEADS.get(config.head)(channels, config.hidden_size)
        # always fused: a fine level needs the fine maps of the backbone
        self.fine_heads = nn.ModuleList(FusedHead(channels, width) for width in config.fine_channels)
        # Not saved, because they follow from the config, and the keys stay those of backbone and head.
        for name, value in self.computed().items():
            self.register_buffer(name, value, persistent=False)
        self.post_init()

    def computed(self) -> dict[str, Tensor]:
        """Return scale and shift from the host's normalisation to the backbone's."""
        scale, shift = _renormalisation(self.config)
        return {"input_scale": scale, "input_shift": shift}

    def read_as(self, other: StudentTrunkConfig) -> None:
        """Take over the normalisation that the backbone expects, and ``attention_eps``, from another configuration."""
        for name in ("input_mean", "input_std", "attention_eps"):
            setattr(self.config, name, getattr(other, name))
        for name, value in self.computed().items():
            getattr(self, name).copy_(value)
        self._set_eps()

    def _set_eps(self) -> None:
        for module in self.backbone.modules():
            if isinstance(module, LiteMLA) and self.config.attention_eps is not None:
                module.eps = self.config.attention_eps

    def image_embedding(self, pixel_values: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b hidden gh gw"]:
        """Return the embedding as a grid, the format in which the teacher's trunk output is cached.

        Args:
            pixel_values: Images, normalised for the host.

        Raises:
            UserError: h or w is not a multiple of ``patch_size``.
        """
        return self.image_levels(pixel_values)[-1]

    def image_levels(self, pixel_values: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """Return the fine levels, finest first, and the embedding. Arguments and errors as ``image_embedding``."""
        rows, columns = grid_of(tuple(pixel_values.shape[-2:]), self.config.patch_size)
        images = (pixel_values * self.input_scale + self.input_shift).to(self.dtype)
        maps = feature_maps(self.backbone, self.levels, images)
        factors = (2**n for n in range(len(self.fine_heads), 0, -1))
        fine = (head(maps, (n * rows, n * columns)) for head, n in zip(self.fine_heads, factors, strict=True))
        return (*fine, self.head(maps, (rows, columns)))

    def forward(self, pixel_values: Float[Tensor, "b 3 h w"], **kwargs) -> TrunkOutput:
        """Return the embedding as tokens in row-major order, and the fine levels as grids.

        Hosts pass further options to their backbone. This one has none and ignores them.

        Args:
            pixel_values: Images, normalised for the host.
        """
        *fine, embedding = self.image_levels(pixel_values)
        return TrunkOutput(last_hidden_state=embedding.flatten(2).transpose(1, 2), fine_levels=tuple(fine) or None)


def build_trunk(config: StudentTrunkConfig, pretrained: bool | Path = False) -> StudentTrunk:
    """Build a trunk.

    Args:
        config: Configuration of the trunk.
        pretrained: False gives random weights, True loads timm's ImageNet weights into the backbone, and a path loads
            the backbone from a file.

    Raises:
        UserError: The backbone cannot run at ``config.image_size``, or the weights cannot be downloaded, cannot be read
            or do not fit.
    """
    trunk = StudentTrunk(config)
    start_backbone(trunk.backbone, config.backbone, config.image_size, pretrained)
    return trunk


def start_backbone(net: nn.Module, name: str, image_size: int, pretrained: bool | Path) -> None:
    """Check that a backbone runs at ``image_size``, and load its initial weights as ``build_trunk`` does."""
    if name not in {row.backbone for row in STUDENTS.values()}:  # the named students accept any size
        check_runs(net, name, image_size)
    if isinstance(pretrained, Path):
        load_backbone(net, pretrained)
    elif pretrained:
        source = build_backbone(name, image_size, pretrained=True)
        net.load_state_dict(source.state_dict(), strict=True)


def grid_of(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the number of cells of ``patch_size`` in an image of ``size`` (height, width).

    Raises:
        UserError: A side is not a multiple of ``patch_size``. The message has the nearest sizes that are.
    """
    for pixels in size:
        if pixels % patch_size or pixels < patch_size:
            low = max(patch_size, pixels // patch_size * patch_size)
            raise UserError(
                f"image_size {pixels} is not a multiple of {patch_size}; use {low} or {low + patch_size}"
                " (SAM 3 was trained at 1008)"
            )
    return size[0] // patch_size, size[1] // patch_size


def _renormalisation(config: StudentTrunkConfig) -> tuple[Tensor, Tensor]:
    """Return scale and shift (1, 3, 1, 1) from the host's normalisation to the backbone's."""
    host_mean, host_std, mean, std = (
        torch.tensor(v, dtype=torch.float32).view(1, 3, 1, 1)
        for v in (config.host_mean, config.host_std, config.input_mean, config.input_std)
    )
    return host_std / std, (host_mean - mean) / std


AutoConfig.register(StudentTrunkConfig.model_type, StudentTrunkConfig)
AutoModel.register(StudentTrunkConfig, StudentTrunk)
