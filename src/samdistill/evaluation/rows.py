"""One line of a comparison: what was measured of one model, by either kind of evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TRUNK, EMBEDDING = "trunk", "embedding"
"""The raw output of the image trunk, and the image embedding that the mask decoder reads."""


@dataclass(frozen=True)
class ModelRow:
    """One model. None, or a missing prompt kind, means that it was not measured.

    trunk_parameters: the image trunk with its head, without the neck; parameters: the whole model.
    trunk_gflops: of the trunk for one image, two per multiply-add. latency_ms: the vision encoder for one image.
    compared: which features were compared with the teacher's: ``TRUNK``, or ``EMBEDDING`` in a SAM and where trunks'
    shapes differ. cosine: their cosine similarity, mean over the cells that show image, then over images. mse: squared
    error per element, averaged in the same way. miou: by prompt kind, mean over objects, against ground truth.
    agreement: by prompt kind, mean IoU with the teacher's mask for the same object. kept: miou as a share of the
    teacher's.
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
    """One model. Figures as in ``metrics.concepts`` and ``mask_ap``; shares lie in 0..1, ``il_mcc`` in -1..1.

    mask_ap: None where no pair has an object. parameters: the whole model; None for a file of predictions.
    latency_ms: one question about one image, from uint8 to masks at the model's resolution. kept: ``cgf1`` as a share
    of the teacher's, where that is above 0.
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
