"""Rows of a results table: the figures of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TRUNK, EMBEDDING = "trunk", "embedding"
"""Features that can be compared: the trunk's output before the neck, and the image embedding of the mask decoder."""


@dataclass(frozen=True)
class ModelRow:
    """Figures of one model on images. None or a missing prompt kind means that the figure was not measured.

    Attributes:
        name: Name of the model.
        trunk_parameters: Parameters of the image trunk with its head, without the neck.
        parameters: Parameters of the whole model.
        trunk_gflops: GFLOP of the trunk for one image. A multiply-add counts as two operations.
        latency_ms: Latency of the vision encoder for one image in milliseconds.
        compared: Features that were compared with the teacher's: ``TRUNK``, or ``EMBEDDING`` for a SAM and if the
            shapes of the trunks' features differ.
        cosine: Cosine similarity of the features, averaged over cells that are not padding, then over images.
        mse: Squared error per feature element, averaged in the same way.
        miou: Mean IoU with the ground truth over objects, 0..1, by prompt kind.
        agreement: Mean IoU with the teacher's mask of the same object, 0..1, by prompt kind.
        kept: ``miou`` divided by the teacher's, by prompt kind.
    """

    name: str
    trunk_parameters: int
    parameters: int
    trunk_gflops: float | None = None
    latency_ms: float | None = None
    compared: str | None = None
    cosine: float | None = None
    mse: float | None = None
    miou: Mapping[str, float] = field(default_factory=dict)
    agreement: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ConceptRow:
    """Figures of one detector. They are defined in ``metrics.concepts`` and in ``mask_ap``.

    Attributes:
        name: Name of the model.
        cgf1: cgF1, the product of ``pmf1`` and ``il_mcc``.
        pmf1: F1 of masks on pairs whose phrase has an object, mean over IoU 0.50 to 0.95, 0..1.
        il_mcc: Image-level Matthews correlation coefficient, -1..1.
        f1_50: The same F1 at IoU 0.50.
        f1_75: The same F1 at IoU 0.75.
        mask_ap: COCO's mask AP, 0..1. None if no pair has an object.
        parameters: Parameters of the whole model. None for a file of predictions.
        latency_ms: Milliseconds for one question about one image, from the uint8 image to masks at the model's
            resolution.
        kept: ``cgf1`` divided by the teacher's, if the teacher's is above 0.
    """

    name: str
    cgf1: float
    pmf1: float
    il_mcc: float
    f1_50: float
    f1_75: float
    mask_ap: float | None = None
    parameters: int | None = None
    latency_ms: float | None = None
    kept: float | None = None
