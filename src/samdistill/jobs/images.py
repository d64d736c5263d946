"""Images of a run, for any job."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from ..config import Run
from ..data import Geometry, Source, ViewTransform, open_source

AnyConfig = TypeVar("AnyConfig", bound=Run)


@dataclass(frozen=True)
class Images(Generic[AnyConfig]):
    """Images of a run on a square canvas. Each part is built on first access.

    Subclasses define ``image_size``, the side of the canvas in pixels.

    Attributes:
        config: Configuration of the run.
    """

    config: AnyConfig

    @property
    def image_size(self) -> int:
        """Side of the canvas in pixels."""
        raise NotImplementedError

    @cached_property
    def geometry(self) -> Geometry:
        """Placement of images on the canvas."""
        return Geometry(self.image_size, self.config.data.geometry)

    @cached_property
    def transform(self) -> ViewTransform:
        """Augmentation and geometry of views."""
        return ViewTransform(self.geometry, self.config.data.augment)

    @cached_property
    def train_source(self) -> Source:
        """The training images."""
        return open_source(self.config.data, "train")

    def held_out_source(self) -> Source:
        """Open the held-out images."""
        return open_source(self.config.data, "held_out")
