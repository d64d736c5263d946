"""What every teacher offers: named taps, the geometry of its embedding, a fingerprint, and the registry of kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import TeacherConfig
from ..ops.images import Statistics
from ..reading import running
from ..registry import Registry, did_you_mean
from ..types import Features, ImageBatch, UserError

IMAGE_EMBEDDING = "image_embedding"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TeacherInfo:
    """What planning needs to know of a teacher, found without reading its weights.

    embedding_shape: channels, rows, columns of ``image_embedding``. params: of the image encoder alone.
    """

    kind: str
    path: str
    image_size: int
    embedding_shape: tuple[int, int, int]
    params: int
    mean: Statistics
    std: Statistics


class Teacher(ABC):
    """A frozen image encoder that is read through named taps.

    ``taps``: tap name to a description of its layout; ``image_embedding`` (b, c, gh, gw) is always there.
    ``fingerprint``: hex digest of the weights as they run, the image size, the precision and the preprocessing: two
    teachers that share it give the same features.
    """

    taps: dict[str, str]
    image_size: int
    embedding_shape: tuple[int, int, int]
    fingerprint: str

    @abstractmethod
    def extract(self, batch: ImageBatch, taps: Sequence[str] = (IMAGE_EMBEDDING,)) -> Features:
        """The asked taps as float32 tensors without gradient, free to be used in a loss.

        Raises ``UserError`` for a tap that this teacher lacks and for images of another size.
        """


class OnlineTeacher(Teacher):
    """A teacher that runs a network and normalises for itself with ``mean`` and ``std``.

    A kind is a registered subclass ``(config, device)`` with ``describe`` and ``_forward``.
    """

    device: torch.device
    mean: Statistics
    std: Statistics

    @classmethod
    @abstractmethod
    def describe(cls, config: TeacherConfig) -> TeacherInfo:
        """Geometry and size from the configuration file alone."""

    @abstractmethod
    def _forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Every tap for a batch that is already on the device, in any dtype."""

    def extract(self, batch: ImageBatch, taps: Sequence[str] = (IMAGE_EMBEDDING,)) -> Features:
        check_taps(taps, self.taps)
        if batch.images.shape[-2:] != (self.image_size, self.image_size):
            height, width = batch.images.shape[-2:]
            raise UserError(
                f"the teacher reads {self.image_size} x {self.image_size} pixels, but the images are "
                f"{height} x {width}; set teacher.image_size, or lay the images on its canvas"
            )
        with running(self), torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            found = self._forward(batch.to(self.device))
        # cloned outside inference mode: an inference tensor cannot be saved for a loss's backward pass
        return {tap: found[tap].to(torch.float32, copy=True).contiguous() for tap in taps}


TEACHERS: Registry[type[OnlineTeacher]] = Registry("teacher")


def check_taps(asked: Sequence[str], known: Sequence[str] | dict[str, str]) -> None:
    for tap in asked:
        if tap not in known:
            raise UserError(f"no tap is called {tap!r}{did_you_mean(tap, list(known))}")


def build_teacher(config: TeacherConfig, device: torch.device | str = "cpu") -> OnlineTeacher:
    """The teacher of ``config``, loaded, in eval mode and frozen, on ``device``."""
    return TEACHERS.get(config.kind)(config, torch.device(device))  # type: ignore[call-arg]


def describe_teacher(config: TeacherConfig) -> TeacherInfo:
    """Image size, embedding shape and parameters of ``config``'s teacher; reads its ``config.json``, no weights."""
    return TEACHERS.get(config.kind).describe(config)


class Levels(Protocol):
    """Maps of the teacher of chosen frames of a video."""

    def read(self, key: str, frames: Sequence[int]) -> Float[Tensor, "t c h w"]: ...
