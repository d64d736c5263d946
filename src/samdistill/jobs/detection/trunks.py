"""Whether a trained trunk learned from the ViT in whose place a hosted student has it."""

from __future__ import annotations

import copy
from pathlib import Path

import yaml
from torch import nn
from transformers import Sam3ViTModel

from ...checkpoints.files import SANDBOX, STUDENT_FOLDER
from ...config import TeacherConfig
from ...engine import newest
from ...engine.state import Checkpoint
from ...reading import foreign
from ...teachers.base import DTYPES
from ...teachers.loading import freeze
from ...teachers.sam3 import trunk_fingerprint
from ...types import UserError


def refuse_other_teacher(trunk: Path, vit: nn.Module, host: str) -> None:
    """Compare the teacher of the run in which a trunk was trained with the ViT that the trunk replaces.

    Two ViTs of one width have outputs of one shape, so nothing else shows that a trunk imitates another one. A trunk
    without a run, such as a file of EfficientSAM3, is accepted: nothing says what its teacher was.

    Args:
        trunk: ``student.trunk``: a run of the encoder job, its ``student/`` or one of its checkpoints.
        vit: The ViT in float32, on the CPU. A trunk that is no ViT of SAM 3 is not compared.
        host: Path of the model with ``vit``, for the message.

    Raises:
        UserError: The run had another teacher.
    """
    found = _checkpoint(trunk)
    if found is None or not isinstance(vit, Sam3ViTModel):
        return
    saved = Checkpoint.peek(found)
    with foreign(found, "no readable configuration of a run"):
        teacher = TeacherConfig.model_validate(yaml.safe_load(saved.config)["teacher"])
    side = vit.config.image_size if teacher.image_size is None else teacher.image_size
    if teacher.precision != "fp32":  # the fingerprint is that of the rounded weights
        vit = freeze(copy.deepcopy(vit), DTYPES[teacher.precision])
    if saved.teacher in ("", trunk_fingerprint(vit, side)):
        return
    bundled = "; the encoder job's 'sandbox' is the bundled tracker" if teacher.path == SANDBOX else ""
    raise UserError(
        f"student.trunk={trunk}: was trained against another ViT (teacher.path={teacher.path}) than that of {host}"
        f"{bundled}; give a trunk that was trained against {host}, or train one in a phase of trunk alone"
    )


def _checkpoint(trunk: Path) -> Path | None:
    """Return the checkpoint of the run that a trunk belongs to, or None."""
    if trunk.is_file():
        return trunk if trunk.name.startswith("ckpt_epoch_") else None
    return newest(trunk.parent if trunk.name == STUDENT_FOLDER else trunk)
