"""Loading a merged ``sam3.pt`` with transformers: names translated, the student built from what the merge recorded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import Sam3Config, Sam3Model

from ..students import StudentTrunkConfig
from ..types import UserError
from .files import TensorInfo, open_weights
from .layout import HF_TRUNK, ORIGINAL_STUDENT, is_vit_tensor
from .loading import compare, pretrained
from .merge import merged_student
from .rename import to_hf
from .student import expected, student_config, student_tensors


def to_hf_state(
    state: Mapping[str, Tensor], student: StudentTrunkConfig, prefix: str = ORIGINAL_STUDENT
) -> dict[str, Tensor]:
    """A merged ``sam3.pt``'s tensors under the names of a ``Sam3Model`` whose trunk is ``student``.

    The tracker's tensors, which ``Sam3Model`` does not have, are left out. Raises ``UserError`` when the student's
    tensors under ``prefix`` are not those its configuration asks for, or when tensors of the teacher's ViT remain.
    """
    own = student_tensors(state, prefix)
    found = {name: TensorInfo.of(state[there]) for name, there in own.items()}
    compare(found, expected(student), "merged sam3.pt", f"the student {student.backbone}")
    there = set(own.values())
    others = [name for name in state if name not in there]
    residue = [name for name in others if is_vit_tensor(name)]
    if residue:
        raise UserError(f"merged sam3.pt: {len(residue)} tensors of the teacher's ViT remain, such as {residue[0]}")
    renamed, _ = to_hf(state, others)
    return renamed | {HF_TRUNK + name: state[at] for name, at in own.items()}


def load_merged(
    path: str | Path, config: Sam3Config | None = None, student: StudentTrunkConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> Sam3Model:  # fmt: skip
    """The ``Sam3Model`` in a merged ``sam3.pt``, in eval mode on the CPU.

    config: of the teacher (its trunk is replaced); None is the published SAM 3. student: None reads what the merge
    recorded beside the file. Raises ``UserError`` when a tensor is missing, left over or of another shape.
    """
    path = Path(path)
    weights = open_weights(path)
    own = student if student is not None else student_config(merged_student(path), path)
    host = copy.deepcopy(config) if config is not None else Sam3Config()
    host.vision_config.backbone_config = own
    state = to_hf_state(weights, own)
    return pretrained(Sam3Model, host, state, path, dtype)
