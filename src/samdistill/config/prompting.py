"""Configuration of promptable models and of the prompts that they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .parts import Count, Name, Pixels, Positive, Strict, Weight


class TeacherEntry(Strict):
    """One of several teachers. ``checkpoint``: a Hugging Face folder or hub id of SAM or a SAM 3 tracker, a folder of
    MobileSAM, an original ``sam_vit_*.pth`` or ``mobile_sam.pt``, or the sandbox's name ``sandbox``."""

    name: Name
    checkpoint: str
    weight: Weight = 1.0
    """Weights are divided by their sum."""
    image_size: Pixels | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    cfg: str | None = None
    """Taken so that published blocks can be pasted, and not read: the checkpoint says what it is."""


class PromptableConfig(Strict):
    """The student. Without ``start`` it is a MobileSAM with random weights."""

    start: Path | None = None
    """MobileSAM's folder or ``mobile_sam.pt``, a finished run of this job, or a merged SAM 3 tracker; its architecture
    is then the student's, and the keys below are not used."""
    backbone: str = "tiny_vit_5m_224"
    """A student's name (es_rv_m) or any timm model with feature maps."""
    neck: Literal["last", "fused"] | None = None
    """last: the deepest map, which has to have the embedding's grid (TinyViT, as MobileSAM has it); fused: all maps.
    None takes last for TinyViT and fused for others."""
    pretrained: bool | Path = False
    image_size: Pixels = 1024
    patch_size: Positive = 16
    """Pixels per cell of the image embedding."""
    width: Positive = 256
    """Channels of the image embedding, the prompts and the decoder."""
    heads: Positive = 8
    """Attention heads of the mask decoder."""


class PromptsConfig(Strict):
    """What is asked of an image. The same prompts go to teachers and student."""

    mode: Literal["point", "box", "mixed", "everything"] = "mixed"
    """mixed: one of a point prompt, a box, or a box with points, drawn per image. everything: points of a grid."""
    objects: Positive = 4
    """Prompted objects per image and step."""
    points: tuple[Positive, Positive] = (1, 3)
    """Least and most positive points of a point prompt, drawn uniformly inside the object."""
    negative_points: tuple[Count, Count] = (0, 0)
    """Least and most negative points, drawn in a band around the object."""
    box_jitter: Annotated[float, Field(ge=0, lt=0.5)] = 0.05
    """Standard deviation of a box's edges, as a share of its sides."""
    grid_points: Positive = 16
    """Points per side of the grid of ``everything``."""
    candidates: Positive = 1
    """Hard prompts: of so many draws per image the one that the student answers worst is trained on."""
    rounds: Count = 0
    """Prompt in the loop: so many corrective clicks after the first answer, each drawn from its error."""
    click: Literal["centre", "random"] = "centre"
    """Where in the error region a corrective click falls: its deepest pixel, or any."""

    @model_validator(mode="after")
    def _ranges(self) -> PromptsConfig:
        for name in ("points", "negative_points"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: give the smaller number first, not {[low, high]}")
        return self
