"""Backbones: the table of the nine named students, and any timm model that returns feature maps."""

from __future__ import annotations

import copy
import difflib
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from jaxtyping import Float
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import Tensor, nn

from ..types import UserError
from .timm_models import TimmArchitecture, current_name, find_timm


@dataclass(frozen=True)
class Student:
    """A row of the table of students.

    Attributes:
        name: Name of the student, such as ``es_rv_m``.
        backbone: timm name of the backbone.
        gflops: Work of the trunk for one image at 1008 px, in 1e9 operations. A multiply-add counts as two.
    """

    name: str
    backbone: str
    gflops: float


STUDENTS: dict[str, Student] = {
    row.name: row
    for row in (
        Student("es_ev_s", "efficientvit_b0", 3.7),
        Student("es_ev_m", "efficientvit_b1", 20.3),
        Student("es_ev_l", "efficientvit_b2", 62.9),
        Student("es_rv_s", "repvit_m0_9", 33.2),
        Student("es_rv_m", "repvit_m1_1", 54.4),
        Student("es_rv_l", "repvit_m2_3", 183.4),
        Student("es_tv_s", "tiny_vit_5m_224", 53.2),
        Student("es_tv_m", "tiny_vit_11m_224", 86.7),
        Student("es_tv_l", "tiny_vit_21m_224", 182.0),
    )
}
"""The named students by name."""


@dataclass(frozen=True)
class Level:
    """A feature map of a backbone.

    Attributes:
        index: Position in the list that the backbone returns.
        channels: Number of channels.
        stride: Pixels of the input per cell.
    """

    index: int
    channels: int
    stride: int


def resolve_backbone(name: str) -> str:
    """Return the timm name of a student's name.

    A timm name is returned unchanged, or as its current name if it is deprecated.

    Raises:
        UserError: The name is unknown. The message has suggestions.

    Example:
        >>> resolve_backbone("es_rv_m")
        'repvit_m1_1'
    """
    if name in STUDENTS:
        return STUDENTS[name].backbone
    name = current_name(name)
    if find_timm(name) is not None:
        return name
    close = difflib.get_close_matches(name, [*STUDENTS, *timm.list_models()], n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there is: {', '.join(STUDENTS)}"
    raise UserError(f"no backbone is called {name!r}; {hint} (timm.list_models() lists the others)")


def statistics(backbone: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation (range 0..1) of the images that the backbone was trained on."""
    settings = _found(backbone).settings
    return tuple(settings.mean), tuple(settings.std)


def _found(backbone: str) -> TimmArchitecture:
    found = find_timm(resolve_backbone(backbone))
    assert found is not None  # a resolved name is always found
    return found


def build_backbone(backbone: str, image_size: int, pretrained: bool = False) -> nn.Module:
    """Build a timm ``features_only`` model.

    Stochastic depth and dropout are disabled, because the student regresses a deterministic target. A forward pass
    always uses the current weights, see ``_live_attention_biases``.

    Args:
        backbone: A student's name or a timm name.
        image_size: Side of the square input in pixels. It is only used for models whose position table has a fixed
            size.
        pretrained: Load timm's weights, which may be downloaded. If False, the weights are random.

    Raises:
        UserError: The model is unknown, has no feature maps, or its weights cannot be downloaded.
    """
    found = _found(backbone)
    name, config = found.name, found.settings
    sized = {"img_size": image_size} if config.fixed_input_size else {}
    if pretrained:
        _require_reachable(name, config.hf_hub_id, config.hf_hub_filename)
    try:
        net = found.build(pretrained=pretrained, pretrained_cfg=config, features_only=True, **sized)
    except OSError as error:
        raise _unreachable(name, config.hf_hub_id, error) from None
    except (RuntimeError, NotImplementedError, AssertionError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"backbone {name!r} cannot give feature maps for {image_size} px images: {reason}") from None
    for module in net.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_bias_cache") and hasattr(module, "attention_bias_idxs"):
            module.get_attention_biases = MethodType(_live_attention_biases, module)
    return net


def _live_attention_biases(self: nn.Module, device: torch.device) -> Tensor:
    """Replacement for timm's method, which caches the first table that it computes in eval mode.

    With the cache, averaged weights or a state dict that is loaded later would use the old biases, and a model that ran
    with gradients could not be copied.
    """
    return self.attention_biases[:, self.attention_bias_idxs]


def levels(net: nn.Module) -> list[Level]:
    """Return the deepest map of each stride of at least 4, finest first. Models without strides (ViTs) have one."""
    info = net.feature_info
    found = {
        stride: Level(index, channels, stride)
        for index, (channels, stride) in enumerate(zip(info.channels(), info.reduction(), strict=True))
    }
    return [found[stride] for stride in sorted(found) if stride >= 4]


def feature_maps(net: nn.Module, wanted: Sequence[Level], images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
    """Run the backbone and return the wanted maps.

    Args:
        net: A model of ``build_backbone``.
        wanted: Levels to return.
        images: Normalised images.

    Returns:
        One map (b, channels, h / stride, w / stride) per level. Sizes that are not whole are rounded as in the
        backbone.
    """
    maps = net(images)
    channels_last = "NHWC" in str(getattr(net, "output_fmt", "NCHW"))
    return [maps[w.index].permute(0, 3, 1, 2) if channels_last else maps[w.index] for w in wanted]


def checkpoint_stages(net: nn.Module) -> None:
    """Enable gradient checkpointing: the backward pass recomputes the stages' activations, which saves memory.

    Gradients do not change. Batch norms process each batch twice, so their running statistics change twice as fast.
    """
    getattr(net, "model", net).set_grad_checkpointing()  # timm wraps some models, such as ViTs, in a feature extractor


def check_runs(net: nn.Module, name: str, image_size: int) -> None:
    """Check by a dry run on the meta device that a backbone accepts images of ``image_size``.

    timm builds every model, but some models only fail in ``forward`` at other sizes than their own.

    Raises:
        UserError: The backbone fails, or its maps are not (b, channels, h, w).
    """
    wanted = levels(net)
    dry = copy.deepcopy(net).to("meta").eval()
    try:
        with torch.no_grad():
            maps = feature_maps(dry, wanted, torch.empty(1, 3, image_size, image_size, device="meta"))
    except NotImplementedError:
        return  # an operation has no meta kernel, so nothing can be concluded
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"backbone {name!r} cannot run on {image_size} px images: {reason}") from None
    if [m.shape[1] for m in maps] != [w.channels for w in wanted]:
        raise UserError(f"backbone {name!r} does not give feature maps as (b, channels, h, w); choose another")


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` file, or of a torch file with ``weights_only``.

    A mapping under the key ``model`` or ``state_dict`` is unwrapped.

    Raises:
        UserError: The file is missing or does not hold a mapping of names to tensors.
    """
    if not path.is_file():
        raise UserError(f"student.pretrained: no file {path}; give a .safetensors or .pth file of trunk weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises any type of error for a wrong file, such as KeyError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"student.pretrained: {path} is not a plain file of tensors: {reason}") from None
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"student.pretrained: {path} does not hold a mapping of names to tensors")
    return dict(state)


def load_backbone(net: nn.Module, path: Path) -> None:
    """Load weights from a file into the backbone. Every tensor of the backbone must be in the file with its shape.

    The file may be a timm classification checkpoint, whose classifier is ignored, or the state dict of a trunk or of a
    whole student. timm's feature wrapper renames ``stages.0`` to ``stages_0``, so names are compared without this
    difference.

    Raises:
        UserError: The file cannot be read, or a tensor is missing or of another shape.
    """
    state = {_canonical(key): value for key, value in read_state(path).items()}
    own = net.state_dict()
    names = {key: _canonical(key) for key in own}
    missing = [key for key, name in names.items() if name not in state]
    if missing:
        raise UserError(
            f"student.pretrained: {path} lacks {len(missing)} of the trunk's {len(own)} tensors, such as "
            f"{missing[0]!r}; was it saved from another backbone?"
        )
    for key, name in names.items():
        if state[name].shape != own[key].shape:
            raise UserError(
                f"student.pretrained: {path}: {key!r} is {tuple(state[name].shape)} but the trunk needs "
                f"{tuple(own[key].shape)}; was it saved from another backbone?"
            )
    net.load_state_dict({key: state[name] for key, name in names.items()}, strict=True)


def _canonical(key: str) -> str:
    for prefix in ("backbone.", "model."):
        key = key.removeprefix(prefix)
    return key.replace("_", ".")


def _unreachable(name: str, hub_id: str | None, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return UserError(
        f"student.pretrained: the ImageNet weights of {name!r} cannot be downloaded ({reason}); on a machine with "
        f"internet run 'hf download {hub_id}' and set student.pretrained to the path of its model.safetensors"
    )


def _require_reachable(name: str, hub_id: str | None, filename: str | None) -> None:
    """Raise early if weights cannot be downloaded; the hub client would retry for a minute. Cached weights pass."""
    if hub_id is None:
        raise UserError(f"student.pretrained: timm has no weights for {name!r}; set it to false or to a file")
    files = [filename] if filename else ["model.safetensors", "pytorch_model.bin"]
    if constants.HF_HUB_OFFLINE or any(isinstance(try_to_load_from_cache(hub_id, file), str) for file in files):
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return  # any HTTP status proves that the server can be reached
    except OSError as error:
        raise _unreachable(name, hub_id, error) from None
