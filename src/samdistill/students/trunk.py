"""The student's trunk as a Hugging Face model that SAM 3 hosts in place of its ViT."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
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
from .heads import HEADS


@strict
class StudentTrunkConfig(PreTrainedConfig):
    """A timm backbone and a head that gives SAM 3's image embedding.

    hidden_size: channels of the embedding (the teacher's). patch_size: pixels per cell of its grid. image_size: side
    of the square input; other multiples of ``patch_size`` work at run time unless the backbone is tied to one size.
    backbone: a student's name or a timm name (stored as the timm name). head: a name of ``HEADS``.
    host_mean, host_std: how ``pixel_values`` arrive normalised (SAM 3's 0.5). input_mean, input_std: what the backbone
    wants; None takes the statistics timm records for it. The trunk converts from one to the other itself: what
    is right for the host is right for the student. geometry: how training images lay on the canvas, ``square`` or
    ``longest_side``.
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

    def __post_init__(self, **kwargs) -> None:
        self.backbone = resolve_backbone(self.backbone)
        HEADS.get(self.head)
        grid_of((self.image_size, self.image_size), self.patch_size)
        mean, std = statistics(self.backbone)
        self.host_mean, self.host_std = list(self.host_mean), list(self.host_std)
        self.input_mean = list(mean if self.input_mean is None else self.input_mean)
        self.input_std = list(std if self.input_std is None else self.input_std)
        super().__post_init__(**kwargs)


class TimmModel(PreTrainedModel):
    """A Hugging Face model around a timm backbone: it keeps what timm and torch initialised, hosted or alone."""

    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True  # timm dispatches attention itself

    def post_init(self) -> None:
        self._awaits_weights = any(p.is_meta for p in self.parameters())
        super().post_init()

    def get_input_embeddings(self) -> None:  # images have no token embeddings; hosts ask
        return None

    def computed(self) -> dict[str, Tensor]:
        """Buffers that follow from the configuration, by name; they need no twin."""
        return {}

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        self._init_weights(module)  # transformers' own passes over a model that holds no tensor directly

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Leave what timm and torch initialised alone, and complete what ``from_pretrained`` could not load.

        ``from_pretrained`` builds on the meta device, then hands over uninitialised memory for everything the file
        does not hold: the buffers that are never saved (TinyViT's attention indices) and any missing weight. Both are
        taken from a freshly built twin, so the result is what the constructor would have given.
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


class StudentTrunk(TimmModel):
    """``pixel_values`` (b, 3, h, w), normalised for the host, to ``last_hidden_state`` (b, gh * gw, hidden_size)."""

    config_class = StudentTrunkConfig
    config: StudentTrunkConfig

    def __init__(self, config: StudentTrunkConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone, config.image_size)
        self.levels = levels(self.backbone)
        self.head = HEADS.get(config.head)([level.channels for level in self.levels], config.hidden_size)
        # not saved: the config is the truth, and the keys stay those of backbone and head
        for name, value in self.computed().items():
            self.register_buffer(name, value, persistent=False)
        self.post_init()

    def computed(self) -> dict[str, Tensor]:
        scale, shift = _renormalisation(self.config)
        return {"input_scale": scale, "input_shift": shift}

    def image_embedding(self, pixel_values: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b hidden gh gw"]:
        """The embedding as a grid, which is how the teacher's raw trunk output is cached.

        Raises ``UserError`` if h or w is not a multiple of ``patch_size``.
        """
        grid = grid_of(tuple(pixel_values.shape[-2:]), self.config.patch_size)
        images = (pixel_values * self.input_scale + self.input_shift).to(self.dtype)
        return self.head(feature_maps(self.backbone, self.levels, images), grid)

    def forward(self, pixel_values: Float[Tensor, "b 3 h w"], **kwargs) -> BaseModelOutput:
        """The embedding as tokens in row-major order. Hosts pass further options on to their backbone; it has none."""
        return BaseModelOutput(last_hidden_state=self.image_embedding(pixel_values).flatten(2).transpose(1, 2))


def build_trunk(config: StudentTrunkConfig, pretrained: bool | Path = False) -> StudentTrunk:
    """A trunk with random weights; ``pretrained`` True takes timm's ImageNet weights, a path reads them from a file.

    Raises ``UserError`` where the backbone cannot run at ``config.image_size``, and where the weights cannot be
    downloaded, read, or do not fit the backbone.
    """
    trunk = StudentTrunk(config)
    start_backbone(trunk.backbone, config.backbone, config.image_size, pretrained)
    return trunk


def start_backbone(net: nn.Module, name: str, image_size: int, pretrained: bool | Path) -> None:
    """Prove that a backbone runs at ``image_size`` and give it its first weights, as ``build_trunk`` says."""
    if name not in {row.backbone for row in STUDENTS.values()}:  # those take any size
        check_runs(net, name, image_size)
    if isinstance(pretrained, Path):
        load_backbone(net, pretrained)
    elif pretrained:
        source = build_backbone(name, image_size, pretrained=True)
        net.load_state_dict(source.state_dict(), strict=True)


def grid_of(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Cells of ``patch_size`` in an image, or a ``UserError`` that names the nearest sizes that work."""
    for pixels in size:
        if pixels % patch_size or pixels < patch_size:
            low = max(patch_size, pixels // patch_size * patch_size)
            raise UserError(
                f"image_size {pixels} is not a multiple of {patch_size}; use {low} or {low + patch_size}"
                " (SAM 3 was trained at 1008)"
            )
    return size[0] // patch_size, size[1] // patch_size


def _renormalisation(config: StudentTrunkConfig) -> tuple[Tensor, Tensor]:
    """Scale and shift (1, 3, 1, 1) from the host's normalisation to the backbone's."""
    host_mean, host_std, mean, std = (
        torch.tensor(v, dtype=torch.float32).view(1, 3, 1, 1)
        for v in (config.host_mean, config.host_std, config.input_mean, config.input_std)
    )
    return host_std / std, (host_mean - mean) / std


AutoConfig.register(StudentTrunkConfig.model_type, StudentTrunkConfig)
AutoModel.register(StudentTrunkConfig, StudentTrunk)
