"""A SAM that hosts a student's trunk: which tensors it replaces, and the configuration of the result."""

from __future__ import annotations

from typing import Any

from ..students import HostedSamConfig, StudentTrunkConfig
from ..types import UserError
from .sam import OpenedSam
from .student import Host, OpenedStudent, as_json

ENCODER, TRUNK = "vision_encoder.", "vision_encoder.backbone."
"""Beginnings of the names of the image encoder in any SAM, and of the trunk in a SAM that hosts one."""


def host_of_sam(opened: OpenedSam) -> Host:
    """Return the channels, patch size and input size that the mask decoder of a SAM expects."""
    prompts = opened.config.prompt_encoder_config
    return Host(opened.config.mask_decoder_config.hidden_size, prompts.patch_size, prompts.image_size)


def check_fits(student: OpenedStudent, host: Host, opened: OpenedSam) -> None:
    """Check that a trunk gives what the mask decoder of a SAM reads.

    Raises:
        UserError: Channels, patch size or image size differ.
    """
    own = Host(student.config.hidden_size, student.config.patch_size, student.config.image_size)
    names = ("channels", "pixels per cell", "pixels per side of an image")
    for name, given, wanted in zip(names, _sizes(own), _sizes(host), strict=True):
        if given != wanted:
            raise UserError(
                f"{student.source}: a trunk for another host: it has {given} {name}, but {opened.source} reads "
                f"{wanted}; train the student against this teacher"
            )


def _sizes(host: Host) -> tuple[int, int, int]:
    return host.hidden_size, host.patch_size, host.image_size


def hosted_settings(opened: OpenedSam, student: StudentTrunkConfig) -> dict[str, Any]:
    """Return the ``config.json`` of a SAM with ``student`` as its image encoder."""
    config = HostedSamConfig.of(opened.config, student)
    return as_json(config) | {"architectures": ["HostedSamModel"], "dtype": _dtype(opened)}


def _dtype(opened: OpenedSam) -> str:
    found = next(about.dtype for name, about in opened.info.items() if not name.startswith(ENCODER))
    return str(found).removeprefix("torch.")


def refuse_prefixes(target_prefix: str | None, replace_prefix: str | None) -> None:
    """Raise ``UserError`` if a prefix is given."""
    if target_prefix or replace_prefix:
        raise UserError("--target-prefix and --replace-prefix are for the trunk of a SAM 3 only; leave them out")
