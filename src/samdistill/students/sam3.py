"""Detection student: transformers' SAM 3 with a small text encoder, a pyramid as vision encoder and shallower heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import AutoModel, Sam3LiteTextModel

from .pyramid import PyramidModel
from .remembering import Remembering
from .sam3_config import EfficientSam3Config
from .trunk import start_backbone

INHERITED = (
    "text_projection",
    "geometry_encoder",
    "detr_encoder",
    "detr_decoder",
    "mask_decoder",
    "dot_product_scoring",
)
"""Modules whose weights a student can copy from its teacher."""
_LAYER = re.compile(r"^((?:geometry_encoder|detr_encoder|detr_decoder)\.layers)\.(\d+)\.")
_TABLES = ("detr_decoder.query_embed.weight", "detr_decoder.reference_points.weight")


class EfficientSam3Model(Remembering, Sam3LiteTextModel):
    """``Sam3LiteTextModel`` that encodes each image once for any number of prompts.

    The result depends on the padding of the text. Attention ignores padding tokens, but the first and the last text
    layer are convolutions over the sequence, and the position table is interpolated to its length. Pad every prompt to
    the same length with the same token, in training and in inference.

    Args:
        config: Configuration of the model.

    Example:
        >>> model = samdistill.EfficientSam3Model.from_pretrained("runs/words/student")  # of a detection run
        >>> model(torch.zeros(1, 3, 126, 126), input_ids=torch.ones(1, 8, dtype=torch.long)).pred_logits.shape
        torch.Size([1, 13])
    """

    config_class = EfficientSam3Config
    config: EfficientSam3Config
    vision_encoder: PyramidModel
    coarsest = "vision_encoder.adapters.3.smooth"


def build_detector(
    config: EfficientSam3Config,
    pretrained: bool | Path = False,
) -> EfficientSam3Model:
    """Build a detection student with random weights. The backbone can be pretrained.

    Args:
        config: Configuration of the student.
        pretrained: As in ``build_trunk``. A file may hold more than the backbone, such as a whole ``StudentTrunk``.

    Raises:
        UserError: As in ``build_trunk``.
    """
    model = EfficientSam3Model(config)
    vision = config.vision_config
    start_backbone(model.vision_encoder.backbone, vision.backbone, vision.image_size, pretrained)
    return model


def inherit(student: EfficientSam3Model, teacher_state: Mapping[str, Tensor]) -> list[str]:
    """Copy the tensors of a ``Sam3Model`` that fit the student's ``INHERITED`` modules by name and shape.

    From a deeper teacher, layers are selected evenly, including the first and the last one (0, 2 and 5 of six). A
    single layer gets the first, which was trained on the same input. From a table with more queries, rows are selected
    evenly, and the same rows of both tables, because queries are not ordered and each belongs to a reference point.
    Feed-forward layers of another width do not fit and stay random.

    Args:
        student: The student to initialise.
        teacher_state: State dict of the teacher.

    Returns:
        Names of the copied tensors.

    Source:
        The selection of layers is that of DistilBERT (Sanh et al., 2019).
    """
    depths = _depths(teacher_state), _depths(student.state_dict())
    taken = []
    for name, own in student.state_dict().items():
        if not name.startswith(INHERITED) or (source := _teacher_name(name, *depths)) not in teacher_state:
            continue
        value = teacher_state[source]
        if name in _TABLES and len(value) > len(own):
            value = value[[_spread(row, len(value), len(own)) for row in range(len(own))]]
        if value.shape == own.shape:
            own.copy_(value)
            taken.append(name)
    return taken


def _spread(index: int, many: int, few: int) -> int:
    """Return the index among ``many`` of the ``index``-th of ``few`` evenly spaced items, where the ends coincide."""
    return index * (many - 1) // max(few - 1, 1)


def _depths(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of layers of each stack of the heads."""
    found: dict[str, int] = {}
    for match in filter(None, map(_LAYER.match, state)):
        found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _teacher_name(name: str, teacher: Mapping[str, int], student: Mapping[str, int]) -> str:
    match = _LAYER.match(name)
    if match is None or match[1] not in teacher:
        return name
    stack, layer = match[1], int(match[2])
    return f"{stack}.{_spread(layer, teacher[stack], student[stack])}.{name[match.end() :]}"


AutoModel.register(EfficientSam3Config, EfficientSam3Model)
