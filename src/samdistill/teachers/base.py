"""What a task learns from, whatever gives it; and encoders: named taps, geometry, fingerprint, registry of kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import TeacherConfig
from ..data import ObjectBatch
from ..ops.images import Statistics
from ..reading import running
from ..registry import Registry, did_you_mean
from ..types import Features, ImageBatch, PromptGroup, UserError

IMAGE_EMBEDDING = "image_embedding"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


Maps = tuple[Float[Tensor, "b _ _ _"], ...]
"""Features of a batch: one map of an encoder, three levels of a detector."""
Records = Mapping[str, Float[Tensor, "b _ _ _"]]
"""Features of a batch by name, as they are cached."""
Frame = tuple[str, int]
"""Key of a video and number of a frame."""
Asked = TypeVar("Asked", contravariant=True)
Read = TypeVar("Read")
Answer = TypeVar("Answer", covariant=True)


class Signals(Protocol[Asked, Read, Answer]):
    """What a task learns from. It does not know whether a teacher runs, records of one are read, or there are several.

    A task calls ``read`` where a batch is made, in a loader's worker, and gives the result to ``answer`` on the device:
    the work that needs no device (reading records, decoding frames) is done beside the training step.

    fingerprint: hex digest of the teacher; checkpoints keep it, and a run goes on with that teacher alone.
    """

    fingerprint: str

    def read(self, asked: Asked) -> Read:
        """What can be had without a device, on the CPU. Raises ``UserError`` for a record that is missing or wrong."""

    def answer(self, asked: Asked, read: Read) -> Answer:
        """What the teacher says about ``asked``: float32 without gradient, on the device, free to be used in a loss."""

    def to(self, device: torch.device | str) -> None:
        """Move what runs; a step whose teacher is there already costs nothing."""


class Prompted(NamedTuple):
    """What promptable teachers are asked: images, and prompts of the batch's own ``groups`` or of a later round."""

    batch: ObjectBatch
    groups: tuple[PromptGroup, ...]


MapSignals = Signals[ImageBatch, Maps, Maps]
FrameSignals = Signals[Sequence[Frame], Maps, Maps]


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


class OnlineTeacher(ABC):
    """A frozen image encoder that is read through named taps; it normalises for itself with ``mean`` and ``std``.

    ``taps``: tap name to a description of its layout; ``image_embedding`` (b, c, gh, gw) is always there.
    ``fingerprint``: hex digest of the weights as they run, the image size, the precision and the preprocessing: two
    teachers that share it give the same features.

    A kind is a registered subclass ``(config, device)`` with ``describe`` and ``_forward``.
    """

    taps: dict[str, str]
    image_size: int
    embedding_shape: tuple[int, int, int]
    fingerprint: str
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
        """The asked taps as float32 tensors without gradient, free to be used in a loss.

        Raises ``UserError`` for a tap that this teacher lacks and for images of another size.
        """
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

    def embedding(self, batch: ImageBatch) -> Maps:
        """``image_embedding`` alone, as ``RunningMaps`` asks."""
        return (self.extract(batch)[IMAGE_EMBEDDING],)

    def to(self, device: torch.device | str) -> OnlineTeacher:
        """Move the network; a step whose teacher is there already costs nothing."""
        if torch.device(device) != self.device:
            self.device = torch.device(device)
            for part in vars(self).values():
                if isinstance(part, nn.Module):
                    part.to(self.device)
        return self


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
