"""Feature channels in units of the teacher's standard deviation (``loss.standardise``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...types import DetectorOutput
from .config import FPN, TRUNK

ITEMS, PER_PASS = 16, 4
"""Images of the measurement, and images in one forward pass of the teacher. They do not depend on ranks."""
SMALLEST = 0.01
"""Smallest standard deviation of a channel, as a share of the mean of all channels of its map."""


@dataclass(frozen=True)
class Scales:
    """Standard deviations of the channels of a teacher's maps. Without any, maps stay as they are.

    Only differences of features enter a loss, so means are not needed.

    Attributes:
        fpn: One per FPN level, (c, 1, 1).
        encoder: That of the DETR encoder's output, (c, 1, 1).
        trunk: That of the ViT's output, (d, 1, 1).
    """

    fpn: tuple[Float[Tensor, "c 1 1"], ...] = ()
    encoder: Float[Tensor, "c 1 1"] | None = None
    trunk: Float[Tensor, "d 1 1"] | None = None

    @classmethod
    def measure(cls, answers: Iterable[DetectorOutput]) -> Scales:
        """Return the standard deviations over all positions of all images, and for the encoder of all questions.

        Args:
            answers: Outputs of the teacher for some batches. At least one.
        """
        found = list(answers)
        levels = zip(*(answer.fpn for answer in found), strict=True)
        trunks = [answer.trunk for answer in found if answer.trunk is not None]
        encoder = _deviation([answer.encoder for answer in found])
        return cls(tuple(map(_deviation, levels)), encoder, _deviation(trunks) if trunks else None)

    def levels(self, fpn: Sequence[Float[Tensor, "b c _ _"]]) -> tuple[Float[Tensor, "b c _ _"], ...]:
        """Return FPN levels in units of the standard deviations, in float32."""
        if not self.fpn:
            return tuple(fpn)
        return tuple(level.float() / scale.to(level.device) for level, scale in zip(fpn, self.fpn, strict=True))

    def maps(self, maps: Sequence[Float[Tensor, "b _ _ _"]], term: str) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """Return maps of images that ``term`` compares, FPN levels or the output of a trunk, in these units."""
        if term == FPN or self.trunk is None:
            return self.levels(maps)
        return tuple(each.float() / self.trunk.to(each.device) for each in maps)

    def of(self, output: DetectorOutput) -> DetectorOutput:
        """Return an output whose features are in units of the standard deviations."""
        if self.encoder is None:
            return output
        encoder = output.encoder.float() / self.encoder.to(output.encoder.device)
        trunk = None if output.trunk is None else self.maps([output.trunk], TRUNK)[0]
        return replace(output, fpn=self.levels(output.fpn), encoder=encoder, trunk=trunk)


def _deviation(maps: Sequence[Float[Tensor, "n c h w"]]) -> Float[Tensor, "c 1 1"]:
    values = torch.cat([each.transpose(0, 1).flatten(1) for each in maps], 1).double()
    found = values.std(1, correction=0)
    return found.clamp(min=SMALLEST * float(found.mean())).float()[:, None, None]
