"""Configuration of promptable models and of their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .parts import Count, Name, Pixels, Positive, Strict, Weight


class TeacherEntry(Strict):
    """One of several teachers.

    ``checkpoint`` is a Hugging Face folder or hub id of a SAM or a SAM 3 tracker, a folder of a MobileSAM, an original
    ``sam_vit_*.pth`` or ``mobile_sam.pt``, or the name of a packaged model such as ``sandbox-sam``.
    """

    name: Name
    checkpoint: str
    weight: Weight = 1.0
    """Weights are divided by their sum."""
    image_size: Pixels | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    cfg: str | None = None
    """Not used. It is accepted so that published blocks can be pasted; the checkpoint determines its architecture."""


class PromptableConfig(Strict):
    """The student. Without ``start`` it is a MobileSAM with random weights."""

    start: Path | None = None
    """Folder of a MobileSAM, a ``mobile_sam.pt``, a finished run of this job, or a merged SAM 3 tracker. Its
    architecture is used, and the keys below are ignored.
    """
    backbone: str = "tiny_vit_5m_224"
    """A student's name (``es_rv_m``) or any timm model with feature maps."""
    neck: Literal["last", "fused", "summed"] | None = None
    """``last`` uses the deepest map, which must have the embedding's grid (TinyViT, as in MobileSAM). ``fused`` uses
    all maps. None is ``last`` for TinyViT and ``fused`` for others.
    """
    pretrained: bool | Path = False
    image_size: Pixels = 1024
    patch_size: Positive = 16
    """Pixels per cell of the image embedding."""
    width: Positive = 256
    """Channels of the image embedding, the prompts and the decoder."""
    heads: Positive = 8
    """Attention heads of the mask decoder."""


class PromptsConfig(Strict):
    """Prompts of an image. Teachers and student get the same ones."""

    mode: Literal["point", "box", "mixed", "everything"] = "mixed"
    """``mixed``: points, a box, or a box with points, drawn per image. ``everything``: the points of a grid."""
    objects: Positive = 4
    """Prompted objects per image and step."""
    points: tuple[Positive, Positive] = (1, 3)
    """Smallest and largest number of positive points of a point prompt. They are drawn uniformly inside the object."""
    negative_points: tuple[Count, Count] = (0, 0)
    """Smallest and largest number of negative points. They are drawn in a band around the object."""
    box_jitter: Annotated[float, Field(ge=0, lt=0.5)] = 0.05
    """Standard deviation of the box edges, as a share of the box sides."""
    grid_points: Positive = 16
    """Points per side of the grid of ``everything``."""
    candidates: Positive = 1
    """Hard prompts: number of draws per image, of which the one with the student's worst result is trained."""
    rounds: Count = 0
    """Number of corrective clicks after the first prediction. Each is drawn from the error region of the one before."""
    click: Literal["centre", "random"] = "centre"
    """Position of a corrective click in the error region: its innermost pixel, or a random one."""

    @model_validator(mode="after")
    def _ranges(self) -> PromptsConfig:
        for name in ("points", "negative_points"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: give the smaller number first, not {[low, high]}")
        return self
