"""A SAM or SAM 2 that hosts a student's trunk: tensors that are replaced and added, and the configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import Sam2Config, Sam2VideoConfig

from ..ops.images import IMAGENET_MEAN, IMAGENET_STD
from ..reading import foreign
from ..students import HostedSamConfig, HostedSamModel, StudentTrunkConfig, expansion, hosted_sam2_config
from ..types import UserError
from .files import TensorInfo
from .rename_sam2 import SAM2
from .sam import FINE_LEVELS, OpenedSam, fine_projection
from .student import Host, OpenedStudent, as_json

ENCODER = "vision_encoder."
"""Beginning of the names of the image encoder in any SAM."""


def host_of_sam(opened: OpenedSam) -> Host:
    """Return what the mask decoder of a SAM or SAM 2 expects of a trunk."""
    prompts, width = opened.config.prompt_encoder_config, opened.config.mask_decoder_config.hidden_size
    fine = tuple(len(fine_projection(opened, name)["bias"]) for name in FINE_LEVELS.values() if _is_sam2(opened))
    return Host(width, prompts.patch_size, prompts.image_size, fine, IMAGENET_MEAN, IMAGENET_STD)


def bridged(student: OpenedStudent, opened: OpenedSam) -> OpenedStudent:
    """Check that a trunk gives what the mask decoder of a SAM reads, and add what connects them.

    For a SAM 2 these are the inverses of the decoder's projections of the fine levels, see ``HostedSam2VisionModel``.

    Returns:
        The student's tensors and those that were added, by their names in the image encoder.

    Raises:
        UserError: Channels, patch size, image size or fine levels differ, or a projection has no inverse.
    """
    host, own = host_of_sam(opened), student.config
    for name, given, wanted in (
        ("channels", own.hidden_size, host.hidden_size),
        ("pixels per cell", own.patch_size, host.patch_size),
        ("pixels per side of an image", own.image_size, host.image_size),
        ("fine levels of these channels", list(own.fine_channels), list(host.fine_channels)),
        ("mean of its images", list(own.host_mean), list(host.mean)),
        ("deviation of its images", list(own.host_std), list(host.std)),
    ):
        if given != wanted:
            raise UserError(
                f"{student.source}: a trunk for another host: {name}: {given}, but {opened.source} reads {wanted}; "
                "train the student against this teacher"
            )
    weights = {f"backbone.{name}": student.weights[name] for name in student.info}
    for level, name in enumerate(FINE_LEVELS if host.fine_channels else ()):
        tensors = fine_projection(opened, FINE_LEVELS[name])
        with foreign(opened.source, f"cannot host a trunk: its projection of fine level {level} has no inverse"):
            weights[f"expand.{level}.weight"], weights[f"expand.{level}.bias"] = expansion(**tensors)
    return replace(student, weights=weights, info={name: TensorInfo.of(tensor) for name, tensor in weights.items()})


def hosted_settings(opened: OpenedSam, student: StudentTrunkConfig) -> dict[str, Any]:
    """Return the ``config.json`` of a SAM with ``student`` as its image encoder."""
    if _is_sam2(opened):
        name = "Sam2VideoModel" if opened.config.model_type == SAM2 else "Sam2Model"
        config = hosted_sam2_config(opened.config, student)
    else:
        name, config = HostedSamModel.__name__, HostedSamConfig.of(opened.config, student)
    return as_json(config) | {"architectures": [name], "dtype": _dtype(opened)}


def _is_sam2(opened: OpenedSam) -> bool:
    return isinstance(opened.config, Sam2Config | Sam2VideoConfig)


def _dtype(opened: OpenedSam) -> str:
    found = next(about.dtype for name, about in opened.info.items() if not name.startswith(ENCODER))
    return str(found).removeprefix("torch.")


def refuse_prefixes(target_prefix: str | None, replace_prefix: str | None) -> None:
    """Raise ``UserError`` if a prefix is given."""
    if target_prefix or replace_prefix:
        raise UserError("--target-prefix and --replace-prefix are for the trunk of a SAM 3 only; leave them out")
