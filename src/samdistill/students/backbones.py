"""Backbones: the nine named students as one table, and any timm model that gives feature maps."""

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
    """One row of the table. gflops: of the trunk for one 1008 px image, a multiply-add counted as two."""

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


@dataclass(frozen=True)
class Level:
    """One map of a backbone: its place in the list the backbone returns, its channels, and its stride in pixels."""

    index: int
    channels: int
    stride: int


def resolve_backbone(name: str) -> str:
    """The timm name behind a student's name (``es_rv_m``); a timm name is returned as it is.

    Raises ``UserError`` with suggestions for anything else.
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
    """Mean and standard deviation, in the 0..1 range, of the images the backbone was trained on."""
    settings = _found(backbone).settings
    return tuple(settings.mean), tuple(settings.std)


def _found(backbone: str) -> TimmArchitecture:
    found = find_timm(resolve_backbone(backbone))
    assert found is not None  # or the name had not been resolved
    return found


def build_backbone(backbone: str, image_size: int, pretrained: bool = False) -> nn.Module:
    """A timm ``features_only`` model with random weights, or timm's own when ``pretrained``.

    Stochastic depth and dropout are turned off: the student regresses a deterministic target, and a forward pass
    always reads the weights as they are. A model whose position table is tied to one input size is built for
    ``image_size``. Raises ``UserError`` for an unknown model, one without feature maps, and weights that cannot be
    reached.
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
    """In place of timm's, which keeps the first table it computes in eval mode.

    An average of the weights, or a state dict loaded later, would go on with the biases of before; and a copy of a
    model that has run with gradients would fail on the kept tensor.
    """
    return self.attention_biases[:, self.attention_bias_idxs]


def levels(net: nn.Module) -> list[Level]:
    """The deepest map of each stride from 4 on, finest first. Models without strides (ViTs) give one."""
    info = net.feature_info
    found = {
        stride: Level(index, channels, stride)
        for index, (channels, stride) in enumerate(zip(info.channels(), info.reduction(), strict=True))
    }
    return [found[stride] for stride in sorted(found) if stride >= 4]


def feature_maps(net: nn.Module, wanted: Sequence[Level], images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
    """The wanted maps as (b, channels, h / stride, w / stride), rounded up as the backbone rounds."""
    maps = net(images)
    channels_last = "NHWC" in str(getattr(net, "output_fmt", "NCHW"))
    return [maps[w.index].permute(0, 3, 1, 2) if channels_last else maps[w.index] for w in wanted]


def checkpoint_stages(net: nn.Module) -> None:
    """From now on the stages are computed again in the backward pass instead of keeping what they computed.

    Gradients stay the same. Batch norms meet each batch twice, so their running statistics follow it twice as fast.
    """
    getattr(net, "model", net).set_grad_checkpointing()  # timm wraps what gives its own features once more


def check_runs(net: nn.Module, name: str, image_size: int) -> None:
    """Dry-run on the meta device: a ``UserError`` if the backbone cannot take images of this size.

    timm builds any model; some fail only when an image of another size than their own arrives.
    """
    wanted = levels(net)
    dry = copy.deepcopy(net).to("meta").eval()
    try:
        with torch.no_grad():
            maps = feature_maps(dry, wanted, torch.empty(1, 3, image_size, image_size, device="meta"))
    except NotImplementedError:
        return  # an operation without a meta kernel proves nothing
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"backbone {name!r} cannot run on {image_size} px images: {reason}") from None
    if [m.shape[1] for m in maps] != [w.channels for w in wanted]:
        raise UserError(f"backbone {name!r} does not give feature maps as (b, channels, h, w); choose another")


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a torch file that holds nothing else (read with ``weights_only``)."""
    if not path.is_file():
        raise UserError(f"student.pretrained: no file {path}; give a .safetensors or .pth file of trunk weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file makes the unpickler raise anything, KeyError among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"student.pretrained: {path} is not a plain file of tensors: {reason}") from None
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"student.pretrained: {path} does not hold a mapping of names to tensors")
    return dict(state)


def load_backbone(net: nn.Module, path: Path) -> None:
    """Load a file of weights strictly into the trunk: every tensor of the trunk must be there with its shape.

    Accepts a timm classification checkpoint (its classifier is left out) and the state dict of a trunk or of a whole
    student. timm's feature wrapper renames ``stages.0`` to ``stages_0``, so names are compared without that difference.
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
    """Fail in seconds, not after the hub client's minute of retries. Cached weights need no network."""
    if hub_id is None:
        raise UserError(f"student.pretrained: timm has no weights for {name!r}; set it to false or to a file")
    files = [filename] if filename else ["model.safetensors", "pytorch_model.bin"]
    if constants.HF_HUB_OFFLINE or any(isinstance(try_to_load_from_cache(hub_id, file), str) for file in files):
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answered
    except OSError as error:
        raise _unreachable(name, hub_id, error) from None
