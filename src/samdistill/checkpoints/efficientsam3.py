"""Students in EfficientSAM3's files: of its first stage, which are weights of one encoder, and in merged checkpoints.

The files have no configuration that is read here. An image trunk follows from the names and its number of channels, and
a text encoder from the shapes of its tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..ops.images import SAM3_MEAN, SAM3_STD
from ..reading import Table
from ..students import StudentTrunkConfig, TextStudentConfig
from ..types import UserError
from .layout import DETECTOR, ORIGINAL_STUDENT, ORIGINAL_TEXT
from .loading import build_config
from .rename import to_hf
from .rename_efficientsam3 import TEXT_ANCHOR, TRUNKS, PublishedTrunk, find_trunk, text_to_theirs

State = Mapping[str, Tensor]
_HEAD, _EPS = "published", 1e-15  # of the head, and of the denominators in EfficientViT's linear attention
_WRAPPERS = ("module.", "student_trunk.")
"""What EfficientSAM3's training may have before the names of a student."""
_TRUNKS = (ORIGINAL_STUDENT, ORIGINAL_STUDENT.removeprefix(DETECTOR))
_TEXTS = (ORIGINAL_TEXT, ORIGINAL_TEXT.removeprefix(DETECTOR))
"""What a merged file has before the names of a student. Its reader accepts both."""
_HEAD_WIDTH = 64
"""Channels of an attention head in all of MobileCLIP's text encoders."""


def own_names(names: Iterable[str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """Return a student's own names to those in a file.

    Args:
        names: Names in the file.
        prefixes: What may be before the student's names. The first one that the file has is used. If it has none of
            them, all tensors are the student's.
    """
    bare = {name.removeprefix(_WRAPPERS[0]): name for name in names}
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in bare)), "")
    own = {name.removeprefix(prefix): there for name, there in bare.items() if name.startswith(prefix)}
    return {name.removeprefix(_WRAPPERS[1]): there for name, there in own.items()}


def read_trunk(
    state: State, where: Path, patch_size: int = 14, image_size: int = 1008
) -> tuple[StudentTrunkConfig, dict[str, Tensor]] | None:
    """Read the trunk of a student from a file of the first stage or a merged one.

    Args:
        state: Tensors of the file.
        where: The file, for error messages.
        patch_size: Pixels per cell of the teacher's grid.
        image_size: Side of the input in pixels.

    Returns:
        The configuration, and the tensors by our names. None if the file has no trunk with EfficientSAM3's names.

    Raises:
        UserError: The trunk is unknown, or has names that are not EfficientSAM3's.
    """
    own = own_names(state, _TRUNKS)
    tensors = {name: state[there] for name, there in own.items()}
    trunk = find_trunk(tensors, where)
    if trunk is None:
        return None
    named = {name: trunk.our_name(name) for name in tensors}
    if unknown := [name for name, ours in named.items() if ours is None]:
        raise UserError(
            f"{where}: wrong checkpoint: {len(unknown)} names are not those of EfficientSAM3's {trunk.backbone}, such "
            f"as {unknown[0]}"
        )
    merged = any(name.removeprefix(_WRAPPERS[0]).startswith(_TRUNKS) for name in own.values())
    config = trunk_config(trunk, tensors, patch_size, image_size, merged)
    return config, {ours: tensors[name] for name, ours in named.items() if ours is not None}


def trunk_config(
    trunk: PublishedTrunk, state: State, patch_size: int = 14, image_size: int = 1008, merged: bool = True
) -> StudentTrunkConfig:
    """Return the configuration of a trunk with its head.

    Args:
        trunk: The trunk.
        state: Tensors by EfficientSAM3's names. The head has the same names as ours.
        patch_size: Pixels per cell of the teacher's grid.
        image_size: Side of the input in pixels.
        merged: EfficientSAM3 normalises images for a merged model as for SAM 3, and for a student of its first stage
            with ImageNet's statistics, which are timm's.
    """
    hidden = state["head.0.weight"].shape[0]
    given = {"input_mean": SAM3_MEAN, "input_std": SAM3_STD} if merged else {}
    return StudentTrunkConfig(
        backbone=trunk.backbone, head=_HEAD, hidden_size=hidden, patch_size=patch_size, image_size=image_size,
        attention_eps=_EPS if trunk.family == "EfficientViT" else None, **given,
    )  # fmt: skip


def merged_trunk(state: State, where: object) -> tuple[PublishedTrunk, StudentTrunkConfig] | None:
    """Return the trunk in a merged ``sam3.pt`` and its configuration, or None if it has not EfficientSAM3's names.

    Raises:
        UserError: The trunk is unknown.
    """
    own = own_names((name for name in state if name.startswith(ORIGINAL_STUDENT)), (ORIGINAL_STUDENT,))
    tensors = {name: state[there] for name, there in own.items()}
    trunk = find_trunk(tensors, where)
    return None if trunk is None else (trunk, trunk_config(trunk, tensors))


def write_trunk(
    config: StudentTrunkConfig, state: State, where: object
) -> tuple[StudentTrunkConfig, dict[str, Tensor]]:
    """Return a trunk under EfficientSAM3's names, for images that are normalised as for SAM 3.

    EfficientSAM3's trunk has no normalisation of its own, so the first convolution and its batch norm take it over. The
    outputs stay the same, except near the image's edge, where the convolution adds zeros.

    Args:
        config: Configuration of the trunk.
        state: Its tensors by our names.
        where: The trunk's file, for error messages.

    Returns:
        The configuration of the changed trunk, and its tensors.

    Raises:
        UserError: EfficientSAM3 has no names for this backbone or this head.
    """
    trunk = TRUNKS.get(config.backbone)
    if trunk is None or config.head != _HEAD:
        raise UserError(
            f"{where}: EfficientSAM3 has no names for the backbone {config.backbone!r} with the head {config.head!r}; "
            f"it has the head {_HEAD!r} on {', '.join(TRUNKS)}"
        )
    changed = copy.deepcopy(config)
    changed.input_mean, changed.input_std = list(config.host_mean), list(config.host_std)
    changed.attention_eps = _EPS if trunk.family == "EfficientViT" else None
    tensors = _renormalised(state, config, trunk)
    return changed, {trunk.their_name(name) or name: tensor for name, tensor in tensors.items()}


def _renormalised(state: State, config: StudentTrunkConfig, trunk: PublishedTrunk) -> dict[str, Tensor]:
    """Return the tensors of a trunk for images with the host's normalisation instead of its own.

    For an image x of the host, the trunk reads ``scale * x + shift``. The convolution's weight takes the scale, and the
    running mean of the batch norm the constant that the shift adds to its input.
    """
    mean, std, host_mean, host_std = (
        torch.tensor(values, dtype=torch.float64)
        for values in (config.input_mean, config.input_std, config.host_mean, config.host_std)
    )
    if torch.equal(mean, host_mean) and torch.equal(std, host_std):
        return dict(state)
    scale, shift = (host_std / std).view(1, 3, 1, 1), ((host_mean - mean) / std).view(1, 3, 1, 1)
    weight, statistic = f"backbone.{trunk.stem[0]}.weight", f"backbone.{trunk.stem[1]}.running_mean"
    kernel, average = state[weight].double(), state[statistic].double()
    return dict(state) | {
        weight: (kernel * scale).to(state[weight].dtype),
        statistic: (average - (kernel * shift).sum((1, 2, 3))).to(state[statistic].dtype),
    }


def read_text(state: State, where: object) -> tuple[TextStudentConfig, dict[str, Tensor]] | None:
    """Read a text encoder from a file of the first stage or a merged one.

    Args:
        state: Tensors of the file.
        where: The file, for error messages.

    Returns:
        The configuration, and the tensors by our names. None if the file has no text encoder with EfficientSAM3's
        names.

    Raises:
        UserError: A name is unknown, or a tensor from which the configuration follows is missing or of a wrong shape.
    """
    own = own_names(state, _TEXTS)
    if TEXT_ANCHOR not in own:
        return None
    tensors, unknown = to_hf({ORIGINAL_TEXT + name: state[there] for name, there in own.items()})
    if unknown:
        raise UserError(
            f"{where}: wrong checkpoint: {len(unknown)} names are not those of EfficientSAM3's text encoder, such as "
            f"{unknown[0].removeprefix(ORIGINAL_TEXT)}"
        )
    return text_config(tensors, where), tensors


def text_config(state: State, where: object) -> TextStudentConfig:
    """Derive the configuration of a text encoder from its tensors, by the names of a ``TextStudent``.

    The activation and the width of an attention head are MobileCLIP's, and tokens attend to padding. A causal mask,
    which MobileCLIP-B has, leaves no trace in the tensors.

    Raises:
        UserError: A tensor is missing or of a wrong shape.
    """
    layers = {name.split(".")[2] for name in state if name.startswith("text_encoder.layers.")}
    mixers = sorted(name for name in state if name.endswith(".token_mixer.mixer.conv.weight"))
    try:
        vocabulary, hidden = state["text_encoder.embeddings.token_embedding.weight"].shape
        settings: Table = {
            "hidden_size": hidden, "vocab_size": vocabulary, "num_attention_heads": max(hidden // _HEAD_WIDTH, 1),
            "num_hidden_layers": len(layers), "use_repmixer_blocks": bool(mixers),
            "intermediate_size": state["text_encoder.layers.1.mlp.fc1.weight"].shape[0],
            "max_position_embeddings": state["text_encoder.embeddings.position_embedding.position_embedding"].shape[2],
            "projection_dim": state["text_encoder.projection.weight"].shape[0],
            "width": state["text_projection.weight"].shape[0], "attend_padding": True,
        }  # fmt: skip
        if mixers:
            settings["repmixer_kernel_size"] = state[mixers[0]].shape[-1]
    except KeyError as error:
        raise UserError(f"{where}: wrong checkpoint: a text encoder of EfficientSAM3 without {error.args[0]}") from None
    except (IndexError, ValueError):
        raise UserError(f"{where}: wrong checkpoint: a tensor of the text encoder has a wrong number of axes") from None
    return build_config(TextStudentConfig, settings, Path(str(where)))


def write_text(config: TextStudentConfig, state: State, where: object) -> dict[str, Tensor]:
    """Return the tensors of a text encoder under EfficientSAM3's names.

    Args:
        config: Configuration of the text encoder.
        state: Its tensors by our names.
        where: Its file, for error messages.

    Raises:
        UserError: The configuration does not follow from the tensors, so a reader would build another encoder.
    """
    derived = text_config(state, where)
    if not config.attend_padding:
        raise UserError(
            f"{where}: this text encoder was trained with masked padding, but in EfficientSAM3's code tokens attend to "
            "padding, so it would answer otherwise; train it with student.attend_padding=true"
        )
    for name in ("num_attention_heads", "use_repmixer_blocks", "hidden_act", "layer_norm_eps"):
        if getattr(derived, name) != getattr(config, name):
            raise UserError(
                f"{where}: EfficientSAM3's files have no configuration, and their reader takes {name} "
                f"{getattr(derived, name)!r} for a text encoder of {config.hidden_size} channels, but this one has "
                f"{getattr(config, name)!r}"
            )
    return text_to_theirs(state)


def students_in(state: State, where: Path) -> str:
    """Return what a file of EfficientSAM3 holds, such as ``a student repvit_m1_1``, or an empty text for other files.

    Raises:
        UserError: The file has an unknown trunk.
    """
    trunk, text = read_trunk(state, where), read_text(state, where)
    found = [] if trunk is None else [f"a student {trunk[0].backbone}"]
    found += [] if text is None else [f"a text encoder of {text[0].num_hidden_layers} layers"]
    return " and ".join(found)
